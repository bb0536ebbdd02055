//! A value of the metadata, viewed in the header's bytes.

use std::fmt;

/// The types that a value can have, with their numbers in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ValueType {
    /// Unsigned, 8 bits.
    U8 = 0,
    /// Signed, 8 bits.
    I8 = 1,
    /// Unsigned, 16 bits.
    U16 = 2,
    /// Signed, 16 bits.
    I16 = 3,
    /// Unsigned, 32 bits.
    U32 = 4,
    /// Signed, 32 bits.
    I32 = 5,
    /// IEEE single precision.
    F32 = 6,
    /// One byte, 0 or 1.
    Bool = 7,
    /// UTF-8 with a 64-bit length before it.
    Str = 8,
    /// Elements of one type, which can be arrays.
    Array = 9,
    /// Unsigned, 64 bits.
    U64 = 10,
    /// Signed, 64 bits.
    I64 = 11,
    /// IEEE double precision.
    F64 = 12,
}

impl ValueType {
    /// The type with this number in a file.
    pub fn by_id(id: u32) -> Option<Self> {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64].get(id as usize).copied()
    }

    /// The least number of bytes that a value of it takes.
    pub(super) fn min_bytes(self) -> u64 {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 | Str => 8,
            Array => 12,
        }
    }

    /// Whether every value of it takes `min_bytes`.
    pub(super) fn is_scalar(self) -> bool {
        !matches!(self, ValueType::Str | ValueType::Array)
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use ValueType::*;
        f.write_str(match self {
            U8 => "a u8",
            I8 => "an i8",
            U16 => "a u16",
            I16 => "an i16",
            U32 => "a u32",
            I32 => "an i32",
            F32 => "an f32",
            Bool => "a bool",
            Str => "a string",
            Array => "an array",
            U64 => "a u64",
            I64 => "an i64",
            F64 => "an f64",
        })
    }
}

/// A value of the metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Unsigned, 8 bits.
    U8(u8),
    /// Signed, 8 bits.
    I8(i8),
    /// Unsigned, 16 bits.
    U16(u16),
    /// Signed, 16 bits.
    I16(i16),
    /// Unsigned, 32 bits.
    U32(u32),
    /// Signed, 32 bits.
    I32(i32),
    /// IEEE single precision.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// Text.
    Str(&'a str),
    /// Elements of one type.
    Array(Array<'a>),
    /// Unsigned, 64 bits.
    U64(u64),
    /// Signed, 64 bits.
    I64(i64),
    /// IEEE double precision.
    F64(f64),
}

impl<'a> Value<'a> {
    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::Str(_) => ValueType::Str,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The value as an integer, if it is one: no integer of GGUF is wider.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// The value as a float, if it is one.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Value::Str(v) => Some(v),
            _ => None,
        }
    }

    /// The truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The array, if it is one.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Value::Array(v) => Some(v),
            _ => None,
        }
    }
}

/// An array of the metadata: its elements are decoded while one walks over them.
#[derive(Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    /// The elements as they stand in the file.
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The type of the elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as they stand in the file.
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + Clone + use<'a> {
        let (element, mut rest) = (self.element, self.bytes);
        (0..self.len).map_while(move |_| decode(element, &mut rest))
    }

    /// The elements in order, if they are strings.
    pub fn strings(&self) -> Option<Strings<'a>> {
        (self.element == ValueType::Str).then_some(Strings { left: self.len, rest: self.bytes })
    }
}

/// A long array isn't worth printing.
impl fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        let mut list = f.debug_list();
        list.entries(self.iter().take(SHOWN));
        if self.len > SHOWN { list.finish_non_exhaustive() } else { list.finish() }
    }
}

/// The strings of an array, in the header's bytes.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    left: usize,
    rest: &'a [u8],
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        self.left = self.left.checked_sub(1)?;
        take_str(&mut self.rest)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

fn take<'a>(rest: &mut &'a [u8], n: u64) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(usize::try_from(n).ok()?)?;
    *rest = left;
    Some(taken)
}

fn fixed<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(*taken)
}

fn take_str<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let n = u64::from_le_bytes(fixed(rest)?);
    std::str::from_utf8(take(rest, n)?).ok()
}

/// Takes a value off the front of bytes that the header's check has passed; `None` if it hasn't.
pub(super) fn decode<'a>(ty: ValueType, rest: &mut &'a [u8]) -> Option<Value<'a>> {
    Some(match ty {
        ValueType::U8 => Value::U8(u8::from_le_bytes(fixed(rest)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(fixed(rest)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(fixed(rest)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(fixed(rest)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(fixed(rest)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(fixed(rest)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(fixed(rest)?)),
        ValueType::Bool => Value::Bool(u8::from_le_bytes(fixed(rest)?) != 0),
        ValueType::Str => Value::Str(take_str(rest)?),
        ValueType::U64 => Value::U64(u64::from_le_bytes(fixed(rest)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(fixed(rest)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(fixed(rest)?)),
        ValueType::Array => {
            let element = ValueType::by_id(u32::from_le_bytes(fixed(rest)?))?;
            let n = u64::from_le_bytes(fixed(rest)?);
            let all = *rest;
            skip(element, n, rest)?;
            let bytes = &all[..all.len() - rest.len()];
            Value::Array(Array { element, len: usize::try_from(n).ok()?, bytes })
        }
    })
}

/// Steps over `n` values.
fn skip(ty: ValueType, n: u64, rest: &mut &[u8]) -> Option<()> {
    if ty.is_scalar() {
        take(rest, n.checked_mul(ty.min_bytes())?)?;
        return Some(());
    }
    for _ in 0..n {
        match ty {
            ValueType::Str => {
                let len = u64::from_le_bytes(fixed(rest)?);
                take(rest, len)?;
            }
            _ => {
                let element = ValueType::by_id(u32::from_le_bytes(fixed(rest)?))?;
                let n = u64::from_le_bytes(fixed(rest)?);
                skip(element, n, rest)?;
            }
        }
    }
    Some(())
}
