//! The house's rules, read from the source: who may use whom, and where unsafe code may live.

use std::path::{Path, PathBuf};

/// The rooms from the bottom up; a room uses rooms that stand before it here, and itself.
const ROOMS: &[&str] = &["cpu", "quant", "gguf", "synth", "ops", "moe", "arch", "session", "engine", "batch", "cli"];

/// Where `#![allow(unsafe_code)]` may stand: a file, or a folder with everything in it. Each says why it needs to.
const UNSAFE_ROOMS: &[(&str, &str)] = &[
    ("src/cpu/", "SIMD, threads that borrow, pages from the kernel"),
    ("src/ops/attention/", "SIMD, heads written by several threads"),
    ("src/ops/kv/", "cache blocks written by several threads"),
    ("src/quant/kernels/", "SIMD"),
    ("src/moe/store/", "slots of an arena that reading threads fill"),
    ("src/arch/weights.rs", "matrices that many threads read into one arena"),
    ("tests/common/llama.rs", "the bindings of the reference"),
    ("tests/hostile_gguf.rs", "an allocator that counts"),
    ("tests/ggml_blocks.rs", "two functions of the reference that its bindings leave out"),
];

/// Every Rust file under a folder of the repository, as paths with forward slashes.
fn rust_files(folder: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("the tree can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path.strip_prefix(root).expect("under the root").to_owned());
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The source without comments and texts: line and block comments, string literals (raw ones too) and character literals.
fn code_only(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(n) = raw_string(rest, &out) {
            n
        } else if c == '"' {
            quoted(rest, '"')
        } else if c == '\'' && is_char_literal(rest) {
            quoted(rest, '\'')
        } else {
            out.push(c);
            c.len_utf8()
        };
        rest = &rest[skip..];
    }
    out
}

/// The length of a block comment, which may hold others.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of a raw string that begins here, unless the `r` ends a longer name.
fn raw_string(text: &str, before: &str) -> Option<usize> {
    if before.ends_with(|c: char| c.is_alphanumeric() || c == '_') && !before.ends_with('b') {
        return None;
    }
    let after = text.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let body = after[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let n = body.find(&close).map_or(body.len(), |at| at + close.len());
    Some(1 + hashes + 1 + n)
}

/// A quote that closes again within a character: not a lifetime.
fn is_char_literal(text: &str) -> bool {
    let mut chars = text.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

/// The length of a literal between unescaped quotes.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == quote {
            return at + c.len_utf8();
        }
    }
    text.len()
}

/// The names that follow `crate::` in code, those in braces too: `crate::{gguf::Map, quant}` names two.
fn crate_uses(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let after = code[at + "crate::".len()..].trim_start();
        match after.strip_prefix('{') {
            Some(list) => names.extend(top_level(list).iter().map(|item| first_name(item))),
            None => names.push(first_name(after)),
        }
    }
    names
}

/// The items of a use list up to its closing brace, nested lists left whole.
fn top_level(list: &str) -> Vec<&str> {
    let (mut items, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                items.push(&list[start..at]);
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    items
}

fn first_name(path: &str) -> String {
    let path = path.trim_start();
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
    path[..end].to_owned()
}

/// The room that a source file belongs to; none for the crate's root files.
fn room_of(path: &Path) -> Option<&'static str> {
    let name = path.strip_prefix("src").ok()?.components().next()?.as_os_str().to_str()?;
    let name = name.strip_suffix(".rs").unwrap_or(name);
    ROOMS.iter().copied().find(|room| *room == name)
}

/// What in this file of a room reaches upwards.
fn upward_uses(room: &str, source: &str) -> Vec<String> {
    let floor = |name: &str| ROOMS.iter().position(|room| *room == name);
    crate_uses(&code_only(source))
        .into_iter()
        .filter(|name| floor(name).is_some_and(|used| Some(used) > floor(room)))
        .collect()
}

#[test]
fn rooms_use_only_rooms_below() {
    let mut wrong = Vec::new();
    for path in rust_files("src") {
        let Some(room) = room_of(&path) else { continue };
        for name in upward_uses(room, &read(&path)) {
            wrong.push(format!("{}: {room} uses {name}, which stands above it", path.display()));
        }
    }
    assert!(wrong.is_empty(), "dependencies run downwards only:\n{}", wrong.join("\n"));
}

#[test]
fn every_folder_is_a_room() {
    for path in rust_files("src") {
        let n = path.components().count();
        let root_file = n == 2 && ["lib.rs", "main.rs"].iter().any(|f| path.ends_with(f));
        assert!(root_file || room_of(&path).is_some(), "{}: not in a room; name it in ROOMS", path.display());
    }
}

#[test]
fn unsafe_stays_in_its_rooms() {
    let (mut wrong, mut used) = (Vec::new(), vec![false; UNSAFE_ROOMS.len()]);
    for folder in ["src", "tests", "examples", "benches"] {
        for path in rust_files(folder) {
            let code = code_only(&read(&path));
            let name = path.to_str().expect("UTF-8 names").replace('\\', "/");
            if !code.contains("allow(unsafe_code)") {
                continue;
            }
            let covers = |room: &str| name == room || (room.ends_with('/') && name.starts_with(room));
            match UNSAFE_ROOMS.iter().position(|(room, _)| covers(room)) {
                Some(i) => used[i] = true,
                None => wrong.push(name),
            }
        }
    }
    let idle: Vec<_> = UNSAFE_ROOMS.iter().zip(&used).filter(|(_, used)| !**used).map(|(room, _)| room.0).collect();
    assert!(idle.is_empty(), "UNSAFE_ROOMS without unsafe code, to be taken off the list: {idle:?}");
    assert!(wrong.is_empty(), "unsafe code outside of UNSAFE_ROOMS: {wrong:?}");
}

/// A block says why it is sound: the line or lines just above it, or the comment that closes above its statement.
#[test]
fn unsafe_blocks_say_why() {
    let wrong = places(silent_unsafe);
    assert!(wrong.is_empty(), "unsafe without a SAFETY line:\n{}", wrong.join("\n"));
}

/// Where a rule finds something wrong in any source: it gives the line numbers.
fn places(rule: fn(&str) -> Vec<usize>) -> Vec<String> {
    let files = ["src", "tests", "examples", "benches"].into_iter().flat_map(rust_files);
    let of_file = |path: PathBuf| {
        let wrong = rule(&read(&path));
        wrong.into_iter().map(move |line| format!("{}:{line}", path.display()))
    };
    files.flat_map(of_file).collect()
}

/// The line numbers of unsafe blocks and impls with no SAFETY comment within the five lines above or in the block's line.
fn silent_unsafe(source: &str) -> Vec<usize> {
    let lines: Vec<&str> = source.lines().collect();
    let mut silent = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        let opens = ["unsafe {", "unsafe impl"]
            .iter()
            .any(|word| code.match_indices(word).any(|(at, _)| !code[..at].contains('"')));
        if opens && !lines[i.saturating_sub(5)..=i].iter().any(|l| l.contains("SAFETY")) {
            silent.push(i + 1);
        }
    }
    silent
}

/// An unsafe function says what its caller must see to. A trait's functions say it in the trait.
#[test]
fn unsafe_functions_say_what_they_ask() {
    let wrong = places(silent_unsafe_fns);
    assert!(wrong.is_empty(), "unsafe functions without a # Safety section:\n{}", wrong.join("\n"));
}

/// The line numbers of unsafe functions, those of `impl Trait for` apart, with no safety section in the comment above.
fn silent_unsafe_fns(source: &str) -> Vec<usize> {
    let lines: Vec<&str> = source.lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut silent = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        if code.find("unsafe fn ").is_none_or(|at| code[..at].contains('"')) {
            continue;
        }
        let above = lines[..i].iter().rev();
        let mut comment =
            above.clone().take_while(|l| ["//", "#["].iter().any(|start| l.trim_start().starts_with(start)));
        let outer = above
            .clone()
            .find(|l| !l.trim().is_empty() && indent(l) < indent(line) && !l.trim_start().starts_with("where"));
        let of_trait = outer.is_some_and(|l| l.contains("impl") && l.contains(" for "));
        if !of_trait && !comment.any(|l| l.contains("# Safety") || l.contains("SAFETY")) {
            silent.push(i + 1);
        }
    }
    silent
}

/// The rules can fail.
#[test]
fn rules_see_what_breaks_them() {
    assert_eq!(
        upward_uses("quant", "use crate::{cpu, gguf::{self, Map}};\nfn f() { crate::cli::run() }"),
        ["gguf", "cli"]
    );
    assert_eq!(upward_uses("ops", "use crate::quant::Format; // crate::engine\nlet a = \"crate::cli\";"), [""; 0]);
    assert_eq!(code_only("a/*b/*c*/d*/e'\\''f<'x>r#\"g\"#h\"\\\"i\"j"), "aef<'x>hj");
    assert_eq!(silent_unsafe("unsafe { x() }"), [1]);
    assert_eq!(silent_unsafe("// SAFETY: y\nunsafe { x() }"), [0; 0]);
    assert_eq!(silent_unsafe_fns("/// x\n#[inline]\nunsafe fn a() {}\nimpl A {\n    unsafe fn b() {}\n}"), [3, 5]);
    assert_eq!(silent_unsafe_fns("/// # Safety\n/// x\n#[inline]\npub unsafe fn a() {}"), [0; 0]);
    assert_eq!(silent_unsafe_fns("unsafe impl A for B {\n    unsafe fn b() {}\n}"), [0; 0]);
}
