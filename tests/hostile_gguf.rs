//! A GGUF file is untrusted: whatever its bytes are, the answer is a header that can be trusted or an
//! error that says what is wrong. Nothing panics, and no more is allocated than a small multiple of
//! the bytes that are there.
#![allow(unsafe_code)] // the counting allocator

use std::alloc::{GlobalAlloc, Layout, System};
use std::borrow::Cow;
use std::cell::Cell;
use std::fs;

use oncall::gguf::{Encode, Gguf, GgufError, GgufWriter, Header, HeaderError, MAX_KEYS, MAX_TENSORS};
use oncall::quant;
use proptest::prelude::*;

/// Counts what each thread holds, and the most that it held.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    HELD.set(HELD.get() + change);
    PEAK.set(PEAK.get().max(HELD.get()));
}

// SAFETY: all calls go to the system's allocator unchanged; the counters are plain thread-local cells.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Parses and checks that no more was allocated than a small multiple of the input.
fn parse_prefix(bytes: &[u8], file_len: u64) -> Result<Header, HeaderError> {
    let owned = Cow::Owned(bytes.to_vec());
    let before = HELD.get();
    PEAK.set(before);
    let result = Header::parse(owned, file_len);
    let peak = PEAK.get() - before;
    let bound = 8 * bytes.len() as isize + 16_384;
    assert!(peak <= bound, "{peak} bytes allocated for a header of {}", bytes.len());
    result
}

fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
    parse_prefix(bytes, bytes.len() as u64)
}

/// Whatever passed the checks can be walked over.
fn walk(header: &Header, file_len: u64) {
    assert_eq!(header.metadata.iter().count(), header.metadata.len());
    for (key, value) in header.metadata.iter() {
        assert_eq!(format!("{:?}", header.metadata.get(key)), format!("{:?}", Some(value)));
        if let Some(array) = value.as_array() {
            assert_eq!(array.iter().count(), array.len());
        }
    }
    let mut ranges: Vec<_> = header.tensors.iter().map(|t| (t.offset, t.offset + t.n_bytes)).collect();
    ranges.sort();
    assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0));
    assert!(ranges.iter().all(|r| r.0 >= header.n_bytes as u64 && r.1 <= file_len));
    for t in &header.tensors {
        assert_eq!(t.format.row_bytes(t.n_cols()).unwrap() * t.n_rows(), t.n_bytes);
        assert_eq!(t.n_elements(), t.n_rows() * t.n_cols());
    }
}

/// The bytes of a header, whatever they are told to be.
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensors: u64, n_keys: u64) -> Self {
        Self(b"GGUF".to_vec()).put(3u32).put(n_tensors).put(n_keys)
    }

    fn put(mut self, value: impl Encode) -> Self {
        value.encode(&mut self.0);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// A key, its type's number, and then whatever is put.
    fn key(self, key: &str, ty: u32) -> Self {
        self.put(key).put(ty)
    }

    fn tensor(self, name: &str, dims: &[u64], format: u32, offset: u64) -> Self {
        let with_dims = dims.iter().fold(self.put(name).put(dims.len() as u32), |raw, d| raw.put(*d));
        with_dims.put(format).put(offset)
    }

    /// Pads to the alignment and appends data.
    fn data(mut self, n: usize) -> Self {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + n, 0);
        self
    }
}

const F32: u32 = 0;
const STR: u32 = 8;
const ARRAY: u32 = 9;

/// A file with a value of every type and tensors of one to four dimensions.
fn valid() -> Vec<u8> {
    let f32_format = quant::by_name("f32").unwrap();
    let mut w = GgufWriter::new();
    w.set("general.architecture", "llama").set("u8", 1u8).set("i8", -1i8).set("u16", 2u16).set("i16", -2i16);
    w.set("u32", 3u32).set("i32", -3i32).set("f32", 1.5f32).set("bool", true).set("u64", 4u64);
    w.set("i64", -4i64).set("f64", 2.5f64).set("strings", ["a", "bc", ""]).set("bools", vec![true, false]);
    w.set("nested", vec![vec![1u16], vec![]]).set("nested strings", [["x"], ["y"]]).set("general.alignment", 32u32);
    w.tensor("one", &[5], f32_format).tensor("two", &[2, 3], f32_format);
    w.tensor("three", &[2, 1, 3], f32_format).tensor("four", &[1, 2, 2, 2], f32_format);
    let mut out = w.in_memory().unwrap();
    out.write(&[1; (5 + 6 + 6 + 8) * 4]).unwrap();
    out.finish().unwrap()
}

#[test]
fn the_valid_file_is_valid() {
    let bytes = valid();
    let header = parse(&bytes).unwrap();
    assert_eq!((header.metadata.len(), header.tensors.len()), (17, 4));
    walk(&header, bytes.len() as u64);
}

#[test]
fn version_2_is_read() {
    let mut bytes = valid();
    bytes[4] = 2;
    let header = parse(&bytes).unwrap();
    assert_eq!(header.version, 2);
    walk(&header, bytes.len() as u64);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = valid();
    let header = parse(&bytes).unwrap();
    let end = header.tensors.iter().map(|t| t.offset + t.n_bytes).max().unwrap() as usize;
    for len in 0..end {
        let error = parse(&bytes[..len]).map(drop).expect_err("a cut file passed");
        match error {
            HeaderError::Empty => assert_eq!(len, 0),
            HeaderError::Truncated { len: said, .. } => assert_eq!(said, len as u64),
            HeaderError::Count { left, .. } => assert!(left < len as u64),
            HeaderError::PastEnd { len: said, .. } => {
                assert!(said == len as u64 && len >= header.n_bytes);
            }
            e => panic!("cut at {len}: {e}"),
        }
    }
    // What follows the last tensor's data is padding, which not every writer writes.
    for len in end..=bytes.len() {
        walk(&parse(&bytes[..len]).unwrap(), len as u64);
    }
}

#[test]
fn a_header_longer_than_what_is_looked_at_is_refused() {
    let bytes = valid();
    let n_bytes = parse(&bytes).unwrap().n_bytes;
    for len in 1..n_bytes {
        let error = parse_prefix(&bytes[..len], bytes.len() as u64).map(drop).unwrap_err();
        assert!(matches!(error, HeaderError::TooLarge { max } if max == len), "{len}: {error}");
    }
    walk(&parse_prefix(&bytes[..n_bytes], bytes.len() as u64).unwrap(), bytes.len() as u64);
}

#[test]
fn a_file_cut_on_disk_is_refused() {
    let bytes = valid();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    for len in [0, 1, 4, 7, 23, 24, 100, bytes.len() / 2] {
        fs::write(&path, &bytes[..len]).unwrap();
        let error = Gguf::open(&path).unwrap_err();
        assert!(matches!(&error, GgufError::Header { path: named, .. } if *named == path), "{error}");
    }
}

/// Each damage with what must be said about it.
#[test]
fn lies_are_named() {
    use HeaderError as E;
    type Check = fn(&HeaderError) -> bool;
    let one_key = || Raw::new(0, 1);
    let one = || Raw::new(1, 0);
    let two = || Raw::new(2, 0);
    let align = |ty: u32| Raw::new(1, 1).key("general.alignment", ty);
    let long = "n".repeat(256);
    let cases: Vec<(&str, Raw, Check)> = vec![
        ("another file", Raw(b"GGML".to_vec()), |e| matches!(e, E::NotGguf { .. })),
        ("a short other file", Raw(b"GX".to_vec()), |e| matches!(e, E::NotGguf { .. })),
        ("version 0", Raw(b"GGUF\0\0\0\0".to_vec()), |e| matches!(e, E::Version { version: 0 })),
        ("version 1", Raw(b"GGUF\x01\0\0\0".to_vec()), |e| matches!(e, E::Version { version: 1 })),
        ("version 4", Raw(b"GGUF\x04\0\0\0".to_vec()), |e| matches!(e, E::Version { version: 4 })),
        ("big-endian 3", Raw(b"GGUF\0\0\0\x03".to_vec()), |e| matches!(e, E::BigEndian)),
        ("big-endian 2", Raw(b"GGUF\0\0\0\x02".to_vec()), |e| matches!(e, E::BigEndian)),
        ("2^64-1 tensors", Raw::new(u64::MAX, 0), |e| matches!(e, E::TooMany { what: "tensors", .. })),
        ("2^64-1 keys", Raw::new(0, u64::MAX), |e| matches!(e, E::TooMany { what: "keys", .. })),
        ("tensors at the limit", Raw::new(MAX_TENSORS, 0), |e| matches!(e, E::Count { what: "tensors", .. })),
        ("keys at the limit", Raw::new(0, MAX_KEYS), |e| matches!(e, E::Count { what: "keys", .. })),
        ("a key of 2^64-1 bytes", one_key().put(u64::MAX).bytes(&[0; 64]), |e| {
            matches!(e, E::Count { count: u64::MAX, .. })
        }),
        ("a key of one byte more", one_key().put(6u64).bytes(b"abcde"), |e| matches!(e, E::Count { .. })),
        ("an empty key", one_key().key("", STR).put("x"), |e| matches!(e, E::NameLength { len: 0, .. })),
        ("a key of 64 KiB", one_key().key(&"k".repeat(65536), STR).put("x"), |e| {
            matches!(e, E::NameLength { what: "key", len: 65536, .. })
        }),
        ("a key that isn't text", one_key().put(2u64).bytes(b"\xff\xfe").put(STR).put("x"), |e| {
            matches!(e, E::NotUtf8 { what: "key", offset: 24 })
        }),
        ("a string that isn't text", one_key().key("k", STR).put(1u64).bytes(b"\xc3"), |e| {
            matches!(e, E::NotUtf8 { what: "string", .. })
        }),
        ("an unknown type", one_key().key("k", 13).put(0u64), |e| matches!(e, E::ValueType { id: 13, .. })),
        ("an unknown type, 2^32-1", one_key().key("k", u32::MAX).put(0u64), |e| {
            matches!(e, E::ValueType { id: u32::MAX, .. })
        }),
        ("an array of an unknown type", one_key().key("k", ARRAY).put(99u32).put(0u64), |e| {
            matches!(e, E::ValueType { id: 99, .. })
        }),
        ("a string of 2^63 bytes", one_key().key("k", STR).put(1u64 << 63), |e| matches!(e, E::Count { .. })),
        ("an array of 2^64-1 bytes", one_key().key("k", ARRAY).put(0u32).put(u64::MAX), |e| {
            matches!(e, E::Count { what: "elements of an array", .. })
        }),
        // 2^61 + 1 elements of 8 bytes: the product is 8.
        ("an array that overflows", one_key().key("k", ARRAY).put(10u32).put((1u64 << 61) + 1).put(0u64), |e| {
            matches!(e, E::Count { .. })
        }),
        ("an array of 2^40 strings", one_key().key("k", ARRAY).put(STR).put(1u64 << 40).bytes(&[0; 99]), |e| {
            matches!(e, E::Count { .. })
        }),
        (
            "an array whose second string is too long",
            one_key().key("k", ARRAY).put(STR).put(2u64).put("x").put(9u64),
            |e| matches!(e, E::Count { what: "string", count: 9, .. }),
        ),
        ("an array of 2^40 arrays", one_key().key("k", ARRAY).put(ARRAY).put(1u64 << 40).bytes(&[0; 99]), |e| {
            matches!(e, E::Count { .. })
        }),
        ("arrays nested five deep", nested(5), |e| matches!(e, E::Depth { max: 4, .. })),
        ("arrays nested 100,000 deep", nested(100_000), |e| matches!(e, E::Depth { .. })),
        ("a bool of 2", one_key().key("k", 7).put(2u8), |e| matches!(e, E::Bool { value: 2, .. })),
        ("a bool of 255 in an array", one_key().key("k", ARRAY).put(7u32).put(2u64).put(1u8).put(255u8), |e| {
            matches!(e, E::Bool { value: 255, .. })
        }),
        (
            "a key twice",
            Raw::new(0, 2).key("k", STR).put("x").key("k", 4).put(1u32),
            |e| matches!(e, E::DuplicateKey { key } if key == "k"),
        ),
        (
            "a screen-filling key twice",
            {
                let key = "é".repeat(30_000);
                Raw::new(0, 2).key(&key, STR).put("x").key(&key, STR).put("x")
            },
            |e| matches!(e, E::DuplicateKey { key } if key.chars().count() == 81),
        ),
        ("alignment 0", align(4).put(0u32).tensor("t", &[1], F32, 0), |e| matches!(e, E::Alignment { .. })),
        ("alignment 48", align(4).put(48u32).tensor("t", &[1], F32, 0), |e| matches!(e, E::Alignment { .. })),
        ("alignment 2^31", align(4).put(1u32 << 31).tensor("t", &[1], F32, 0), |e| matches!(e, E::Alignment { .. })),
        ("alignment -32", align(5).put(-32i32).tensor("t", &[1], F32, 0), |e| matches!(e, E::Alignment { .. })),
        (
            "alignment \"32\"",
            align(STR).put("32").tensor("t", &[1], F32, 0),
            |e| matches!(e, E::Alignment { value, .. } if value == "a string"),
        ),
        ("no name", one().tensor("", &[1], F32, 0).data(4), |e| matches!(e, E::NameLength { len: 0, .. })),
        ("a long name", one().tensor(&long, &[1], F32, 0).data(4), |e| {
            matches!(e, E::NameLength { what: "tensor name", len: 256, .. })
        }),
        ("a name that isn't text", one().put(1u64).bytes(b"\x80").put(1u32).put(1u64).put(F32).put(0u64), |e| {
            matches!(e, E::NotUtf8 { what: "tensor name", .. })
        }),
        ("no dimensions", one().tensor("t", &[], F32, 0).data(4), |e| matches!(e, E::Dimensions { n_dims: 0, .. })),
        ("five dimensions", one().tensor("t", &[1; 5], F32, 0).data(4), |e| {
            matches!(e, E::Dimensions { n_dims: 5, .. })
        }),
        ("2^32-1 dimensions", one().put("t").put(u32::MAX).data(64), |e| matches!(e, E::Dimensions { .. })),
        (
            "a dimension of zero",
            one().tensor("t", &[4, 0], F32, 0).data(4),
            |e| matches!(e, E::ZeroDimension { shape, .. } if *shape == [4, 0]),
        ),
        ("2^32 x 2^32", one().tensor("t", &[1 << 32, 1 << 32], F32, 0).data(4), |e| matches!(e, E::Overflow { .. })),
        ("2^62 elements", one().tensor("t", &[1 << 62], F32, 0).data(4), |e| matches!(e, E::Overflow { .. })),
        ("2^64-1 elements", one().tensor("t", &[u64::MAX], F32, 0).data(4), |e| matches!(e, E::Overflow { .. })),
        // 3 * 0x5555_5555_5555_5556 = 2^64 + 2.
        ("a product that wraps", one().tensor("t", &[0x5555_5555_5555_5556, 3], F32, 0).data(4), |e| {
            matches!(e, E::Overflow { .. })
        }),
        (
            "an unknown format",
            one().tensor("blk.0.x", &[1], 999, 0).data(4),
            |e| matches!(e, E::Format { tensor, id: 999 } if tensor == "blk.0.x"),
        ),
        ("half a block", one().tensor("t", &[48], quant::by_name("q8_0").unwrap().id, 0).data(64), |e| {
            matches!(e, E::Row { n_cols: 48, format: "q8_0", block_len: 32, .. })
        }),
        ("an offset between the steps", one().tensor("t", &[1], F32, 4).data(64), |e| {
            matches!(e, E::Misaligned { offset: 4, alignment: 32, .. })
        }),
        ("an offset past the end", one().tensor("t", &[1], F32, 64).data(64), |e| {
            matches!(e, E::PastEnd { offset: 64, .. })
        }),
        ("an offset of 2^64-32", one().tensor("t", &[1], F32, u64::MAX - 31).data(64), |e| {
            matches!(e, E::PastEnd { .. })
        }),
        ("one byte short", one().tensor("t", &[17], F32, 0).data(67), |e| matches!(e, E::PastEnd { n_bytes: 68, .. })),
        ("the same bytes twice", two().tensor("a", &[4], F32, 32).tensor("b", &[4], F32, 32).data(64), |e| {
            matches!(e, E::Overlap { .. })
        }),
        (
            "an overlap by a step",
            two().tensor("b", &[8], F32, 32).tensor("a", &[9], F32, 0).data(64),
            |e| matches!(e, E::Overlap { first, second } if first == "a" && second == "b"),
        ),
        (
            "the same tensor twice",
            two().tensor("a", &[4], F32, 0).tensor("a", &[4], F32, 0).data(64),
            |e| matches!(e, E::DuplicateTensor { tensor } if tensor == "a"),
        ),
        (
            "a name twice",
            two().tensor("a", &[4], F32, 0).tensor("a", &[4], F32, 32).data(64),
            |e| matches!(e, E::DuplicateTensor { tensor } if tensor == "a"),
        ),
    ];
    for (what, raw, expected) in cases {
        match parse(&raw.0) {
            Ok(_) => panic!("{what} passed"),
            Err(error) => {
                assert!(expected(&error), "{what}: {error:?}");
                let message = error.to_string();
                assert!(!message.is_empty() && message.len() < 1000, "{what}: {message}");
            }
        }
    }
}

fn nested(depth: usize) -> Raw {
    let raw = Raw::new(0, 1).key("k", ARRAY);
    let raw = (1..depth).fold(raw, |raw, _| raw.put(ARRAY).put(1u64));
    raw.put(0u32).put(1u64).put(7u8)
}

#[test]
fn arrays_nested_four_deep_are_read() {
    let header = parse(&nested(4).0).unwrap();
    walk(&header, u64::MAX);
    assert_eq!(format!("{:?}", header.metadata.get("k").unwrap()), "Array([Array([Array([Array([U8(7)])])])])");
}

#[test]
fn gaps_between_tensors_and_any_order_are_read() {
    let raw = Raw::new(2, 0).tensor("b", &[4], F32, 96).tensor("a", &[4], F32, 32).data(112);
    walk(&parse(&raw.0).unwrap(), raw.0.len() as u64);
}

/// A header of nothing but the smallest keys and tensors still costs only a small multiple of itself.
#[test]
fn many_small_things_cost_a_small_multiple() {
    let n = 20_000u64;
    let keys = (0..n).fold(Raw::new(0, n), |raw, i| raw.key(&format!("{i:x}"), 0).put(1u8));
    walk(&parse(&keys.0).unwrap(), keys.0.len() as u64);
    let tensors = (0..n).fold(Raw::new(n, 0), |raw, i| raw.tensor(&format!("{i:x}"), &[1], F32, i * 32));
    let tensors = tensors.data(32 * n as usize);
    walk(&parse(&tensors.0).unwrap(), tensors.0.len() as u64);
    // Cut before the data: refused, and no dearer.
    let header = 24 + (n as usize) * (8 + 4 + 4 + 8 + 4 + 8);
    assert!(parse(&tensors.0[..header]).is_err());
}

/// A vocabulary isn't copied string by string.
#[test]
fn a_vocabulary_costs_nothing_but_its_bytes() {
    let tokens: Vec<String> = (0..150_000).map(|i| format!("token{i}")).collect();
    let mut w = GgufWriter::new();
    w.set("tokenizer.ggml.tokens", tokens.as_slice());
    let bytes = w.in_memory().unwrap().finish().unwrap();
    let owned = Cow::Owned(bytes.clone());
    let before = HELD.get();
    PEAK.set(before);
    let header = Header::parse(owned, bytes.len() as u64).unwrap();
    assert!(PEAK.get() - before < 4096);
    let read = header.metadata.required_strings("tokenizer.ggml.tokens").unwrap();
    assert!(read.eq(tokens.iter().map(String::as_str)));
    assert!(PEAK.get() - before < 4096);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    /// Any bytes of a header replaced by any others.
    #[test]
    fn a_mutated_header_is_refused_or_right(
        changes in prop::collection::vec((any::<prop::sample::Index>(), mutation()), 1..6),
    ) {
        let mut bytes = valid();
        let n_bytes = parse(&bytes).unwrap().n_bytes;
        for (at, with) in changes {
            let at = at.index(n_bytes);
            for (to, from) in bytes[at..].iter_mut().zip(with) {
                *to = from;
            }
        }
        if let Ok(header) = parse(&bytes) {
            walk(&header, bytes.len() as u64);
        }
    }

    /// Bytes put in or taken out, so that everything after them moves.
    #[test]
    fn a_shifted_header_is_refused_or_right(
        at in any::<prop::sample::Index>(),
        out in 0usize..16,
        with in prop::collection::vec(any::<u8>(), 0..16),
    ) {
        let mut bytes = valid();
        let at = at.index(bytes.len());
        let end = (at + out).min(bytes.len());
        bytes.splice(at..end, with);
        if let Ok(header) = parse(&bytes) {
            walk(&header, bytes.len() as u64);
        }
    }

    #[test]
    fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [b"GGUF\x03\0\0\0".as_slice(), &noise].concat();
        if let Ok(header) = parse(&bytes) {
            walk(&header, bytes.len() as u64);
        }
    }
}

/// What most often breaks a parser: single bytes, and the extremes of each width.
fn mutation() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<u8>().prop_map(|b| vec![b]),
        (0u32..16).prop_map(|v| v.to_le_bytes().to_vec()),
        prop_oneof![Just(0u64), Just(1), Just(u64::MAX), Just(1 << 63), Just(1 << 61), Just(u64::MAX - 31), 0u64..200]
            .prop_map(|v| v.to_le_bytes().to_vec()),
    ]
}
