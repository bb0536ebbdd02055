//! Whatever the writer writes, the reader reads.

use std::fs;
use std::path::Path;

use oncall::gguf::{Gguf, GgufWriter, Value};
use oncall::quant;
use proptest::prelude::*;

/// A value of the metadata that owns what it says.
#[derive(Clone, Debug)]
enum Owned {
    U8(u8),
    I16(i16),
    U32(u32),
    I64(i64),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    F64s(Vec<f64>),
    Nested(Vec<Vec<i32>>),
}

impl Owned {
    fn set(&self, w: &mut GgufWriter, key: &str) {
        match self {
            Owned::U8(v) => w.set(key, *v),
            Owned::I16(v) => w.set(key, *v),
            Owned::U32(v) => w.set(key, *v),
            Owned::I64(v) => w.set(key, *v),
            Owned::F32(v) => w.set(key, *v),
            Owned::Bool(v) => w.set(key, *v),
            Owned::Str(v) => w.set(key, v.as_str()),
            Owned::Strs(v) => w.set(key, v.as_slice()),
            Owned::F64s(v) => w.set(key, v.as_slice()),
            Owned::Nested(v) => w.set(key, v.as_slice()),
        };
    }

    /// Bits are compared, so that a NaN equals itself.
    fn check(&self, got: Value<'_>) {
        let array = |got: Value<'_>| got.as_array().map(|a| a.iter().count());
        match self {
            Owned::U8(v) => assert_eq!(got, Value::U8(*v)),
            Owned::I16(v) => assert_eq!(got, Value::I16(*v)),
            Owned::U32(v) => assert_eq!(got, Value::U32(*v)),
            Owned::I64(v) => assert_eq!(got, Value::I64(*v)),
            Owned::F32(v) => assert!(matches!(got, Value::F32(g) if g.to_bits() == v.to_bits())),
            Owned::Bool(v) => assert_eq!(got, Value::Bool(*v)),
            Owned::Str(v) => assert_eq!(got, Value::Str(v)),
            Owned::Strs(v) => assert!(got.as_array().unwrap().strings().unwrap().eq(v.iter().map(String::as_str))),
            Owned::F64s(v) => {
                assert_eq!(array(got), Some(v.len()));
                for (g, v) in got.as_array().unwrap().iter().zip(v) {
                    assert!(matches!(g, Value::F64(g) if g.to_bits() == v.to_bits()));
                }
            }
            Owned::Nested(v) => {
                assert_eq!(array(got), Some(v.len()));
                for (g, v) in got.as_array().unwrap().iter().zip(v) {
                    let g: Vec<i128> = g.as_array().unwrap().iter().map(|g| g.as_integer().unwrap()).collect();
                    assert_eq!(g, v.iter().map(|v| i128::from(*v)).collect::<Vec<_>>());
                }
            }
        }
    }
}

fn value() -> impl Strategy<Value = Owned> {
    use prop::collection::vec;
    prop_oneof![
        any::<u8>().prop_map(Owned::U8),
        any::<i16>().prop_map(Owned::I16),
        any::<u32>().prop_map(Owned::U32),
        any::<i64>().prop_map(Owned::I64),
        any::<u32>().prop_map(|bits| Owned::F32(f32::from_bits(bits))),
        any::<bool>().prop_map(Owned::Bool),
        any::<String>().prop_map(Owned::Str),
        vec(any::<String>(), 0..6).prop_map(Owned::Strs),
        vec(any::<u64>().prop_map(f64::from_bits), 0..6).prop_map(Owned::F64s),
        vec(vec(any::<i32>(), 0..4), 0..4).prop_map(Owned::Nested),
    ]
}

/// A tensor's shape with the index of its format; the first dimension is in blocks.
fn tensor() -> impl Strategy<Value = (usize, Vec<u64>)> {
    (any::<prop::sample::Index>(), prop::collection::vec(1u64..4, 1..=4)).prop_map(|(format, mut shape)| {
        let format = format.index(quant::FORMATS.len());
        shape[0] *= quant::FORMATS[format].block_len as u64;
        (format, shape)
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        keys in prop::collection::btree_map("[a-zé._0-9]{1,20}", value(), 0..12),
        tensors in prop::collection::btree_map("[a-z.]{1,20}", tensor(), 0..8),
        alignment in prop::option::of(0u32..13),
        chunk in 1usize..4000,
    ) {
        let mut w = GgufWriter::new();
        for (key, value) in &keys {
            value.set(&mut w, key);
        }
        if let Some(log) = alignment {
            w.set("general.alignment", 1u32 << log);
        }
        let mut data = Vec::new();
        for (i, (name, (format, shape))) in tensors.iter().enumerate() {
            let format = quant::FORMATS[*format];
            w.tensor(name, shape, format);
            let rows: u64 = shape[1..].iter().product();
            let n = format.row_bytes(shape[0]).unwrap() * rows;
            data.extend((0..n).map(|j| (i as u64 * 31 + j) as u8));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let mut out = w.create(&path, false).unwrap();
        for part in data.chunks(chunk) {
            out.write(part).unwrap();
        }
        out.finish().unwrap();
        prop_assert_eq!(fs::metadata(&path).unwrap().len(), w.n_bytes().unwrap());

        let gguf = Gguf::open(&path).unwrap();
        prop_assert_eq!(gguf.metadata().len(), keys.len() + usize::from(alignment.is_some()));
        for (key, value) in &keys {
            value.check(gguf.metadata().get(key).unwrap());
        }
        let mut read = Vec::new();
        for (t, (name, (format, shape))) in gguf.tensors().iter().zip(&tensors) {
            prop_assert_eq!((&*t.name, t.shape(), t.format.id), (name.as_str(), &shape[..], quant::FORMATS[*format].id));
            prop_assert_eq!(t.offset % (1u64 << alignment.unwrap_or(5)), 0);
            let at = read.len();
            read.resize(at + t.n_bytes as usize, 0);
            gguf.read_at(t, 0, &mut read[at..]).unwrap();
        }
        prop_assert_eq!(read, data);
    }
}

/// A file written again from what was read of it is the same file.
#[test]
fn the_embedded_model_survives_a_copy() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinymoe-stories-Q8_0.gguf");
    let gguf = Gguf::open(&from).unwrap();
    let mut w = GgufWriter::new();
    w.set_all(gguf.metadata());
    for t in gguf.tensors() {
        w.tensor(&t.name, t.shape(), t.format);
    }
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("copy.gguf");
    let mut out = w.create(&to, false).unwrap();
    let mut row = Vec::new();
    for t in gguf.tensors() {
        row.resize(t.row_bytes() as usize, 0);
        for i in 0..t.n_rows() {
            gguf.read_at(t, i * t.row_bytes(), &mut row).unwrap();
            out.write(&row).unwrap();
        }
    }
    out.finish().unwrap();
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap(), "the copy differs");
}
