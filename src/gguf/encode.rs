//! Rust values as values of the metadata.

use byteorder::{LittleEndian, WriteBytesExt};

use super::value::{Array, Value, ValueType};

/// A value that can be written into the metadata.
pub trait Encode {
    /// Its type in the file.
    const TYPE: ValueType;

    /// Appends it as it stands in the file, without its type.
    fn encode(&self, out: &mut Vec<u8>);
}

macro_rules! encode_number {
    ($($ty:ty, $variant:ident, $write:ident;)*) => {
        $(
            impl Encode for $ty {
                const TYPE: ValueType = ValueType::$variant;

                fn encode(&self, out: &mut Vec<u8>) {
                    out.$write::<LittleEndian>(*self).expect("a Vec takes all bytes");
                }
            }
        )*
    };
}

encode_number! {
    u16, U16, write_u16;
    i16, I16, write_i16;
    u32, U32, write_u32;
    i32, I32, write_i32;
    u64, U64, write_u64;
    i64, I64, write_i64;
    f32, F32, write_f32;
    f64, F64, write_f64;
}

impl Encode for u8 {
    const TYPE: ValueType = ValueType::U8;

    fn encode(&self, out: &mut Vec<u8>) {
        out.push(*self);
    }
}

impl Encode for i8 {
    const TYPE: ValueType = ValueType::I8;

    fn encode(&self, out: &mut Vec<u8>) {
        out.push(*self as u8);
    }
}

impl Encode for bool {
    const TYPE: ValueType = ValueType::Bool;

    fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Encode for str {
    const TYPE: ValueType = ValueType::Str;

    fn encode(&self, out: &mut Vec<u8>) {
        (self.len() as u64).encode(out);
        out.extend_from_slice(self.as_bytes());
    }
}

impl Encode for String {
    const TYPE: ValueType = ValueType::Str;

    fn encode(&self, out: &mut Vec<u8>) {
        self.as_str().encode(out);
    }
}

impl<T: Encode> Encode for [T] {
    const TYPE: ValueType = ValueType::Array;

    fn encode(&self, out: &mut Vec<u8>) {
        (T::TYPE as u32).encode(out);
        (self.len() as u64).encode(out);
        for v in self {
            v.encode(out);
        }
    }
}

impl<T: Encode, const N: usize> Encode for [T; N] {
    const TYPE: ValueType = ValueType::Array;

    fn encode(&self, out: &mut Vec<u8>) {
        self.as_slice().encode(out);
    }
}

impl<T: Encode> Encode for Vec<T> {
    const TYPE: ValueType = ValueType::Array;

    fn encode(&self, out: &mut Vec<u8>) {
        self.as_slice().encode(out);
    }
}

impl<T: Encode + ?Sized> Encode for &T {
    const TYPE: ValueType = T::TYPE;

    fn encode(&self, out: &mut Vec<u8>) {
        (**self).encode(out);
    }
}

impl Encode for Array<'_> {
    const TYPE: ValueType = ValueType::Array;

    fn encode(&self, out: &mut Vec<u8>) {
        (self.element_type() as u32).encode(out);
        (self.len() as u64).encode(out);
        out.extend_from_slice(self.bytes());
    }
}

/// Appends a value that was read from another file.
pub(super) fn encode_value(value: &Value<'_>, out: &mut Vec<u8>) {
    match value {
        Value::U8(v) => v.encode(out),
        Value::I8(v) => v.encode(out),
        Value::U16(v) => v.encode(out),
        Value::I16(v) => v.encode(out),
        Value::U32(v) => v.encode(out),
        Value::I32(v) => v.encode(out),
        Value::F32(v) => v.encode(out),
        Value::Bool(v) => v.encode(out),
        Value::Str(v) => v.encode(out),
        Value::Array(v) => v.encode(out),
        Value::U64(v) => v.encode(out),
        Value::I64(v) => v.encode(out),
        Value::F64(v) => v.encode(out),
    }
}
