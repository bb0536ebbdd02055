//! The metadata of a model: keys and values, viewed in one copy of the header's bytes.

use std::borrow::Cow;
use std::ops::Range;

use super::error::KeyError;
use super::value::{Array, Strings, Value, ValueType, decode};

/// The most layers for which [`Metadata::u32_per_layer`] repeats a single value.
const MAX_LAYERS: usize = 1 << 16;

/// A key and its value's place in the header.
pub(super) struct Entry {
    pub(super) key: Range<usize>,
    pub(super) ty: ValueType,
    pub(super) value: Range<usize>,
}

/// Keys and values in the file's order. Holds the header's bytes once; values are views of them.
pub struct Metadata {
    bytes: Cow<'static, [u8]>,
    entries: Vec<Entry>,
    /// Indexes of `entries`, sorted by key.
    by_key: Vec<u32>,
}

impl std::fmt::Debug for Metadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl Metadata {
    /// Of checked entries that point into `bytes`, and their order by key.
    pub(super) fn new(bytes: Cow<'static, [u8]>, entries: Vec<Entry>, by_key: Vec<u32>) -> Self {
        Self { bytes, entries, by_key }
    }

    fn key(&self, entry: &Entry) -> &str {
        std::str::from_utf8(&self.bytes[entry.key.clone()]).unwrap_or_default()
    }

    fn value(&self, entry: &Entry) -> Option<Value<'_>> {
        decode(entry.ty, &mut &self.bytes[entry.value.clone()])
    }

    /// Keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries.iter().filter_map(|e| Some((self.key(e), self.value(e)?)))
    }

    /// The value of a key, whatever its type.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let at = self.by_key.binary_search_by(|&i| self.key(&self.entries[i as usize]).cmp(key)).ok()?;
        self.value(&self.entries[self.by_key[at] as usize])
    }

    /// Whether the key is there, whatever its type.
    pub fn contains(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// An integer of any type that fits 32 bits, if the key is there.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, KeyError> {
        self.get(key).map(|v| integer(key, &v, "a number from 0 to 2^32-1")).transpose()
    }

    /// An integer of any type that fits 64 bits, if the key is there.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, KeyError> {
        self.get(key).map(|v| integer(key, &v, "a number from 0 to 2^64-1")).transpose()
    }

    /// An integer of any type that fits 32 bits with a sign, if the key is there.
    pub fn i32(&self, key: &str) -> Result<Option<i32>, KeyError> {
        self.get(key).map(|v| integer(key, &v, "a number from -2^31 to 2^31-1")).transpose()
    }

    /// A finite f32 or f64, if the key is there.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, KeyError> {
        self.get(key).map(|v| finite(key, &v)).transpose()
    }

    /// A truth value, if the key is there.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, KeyError> {
        self.get(key).map(|v| v.as_bool().ok_or_else(|| wrong_type(key, &v, "a bool"))).transpose()
    }

    /// Text, if the key is there.
    pub fn str(&self, key: &str) -> Result<Option<&str>, KeyError> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| wrong_type(key, &v, "a string"))).transpose()
    }

    /// An array of whatever elements, if the key is there.
    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>, KeyError> {
        self.get(key).map(|v| v.as_array().ok_or_else(|| wrong_type(key, &v, "an array"))).transpose()
    }

    /// An array of strings, if the key is there: views, nothing is copied.
    pub fn strings(&self, key: &str) -> Result<Option<Strings<'_>>, KeyError> {
        let Some(array) = self.array(key)? else {
            return Ok(None);
        };
        let strings = array.strings().ok_or_else(|| KeyError::ElementType {
            key: key.into(),
            found: array.element_type(),
            wanted: "a string",
        })?;
        Ok(Some(strings))
    }

    /// An array of integers that all fit 32 bits, if the key is there.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>, KeyError> {
        self.elements(key, |v| integer(key, v, "a number from 0 to 2^32-1"))
    }

    /// An array of integers that all fit 32 bits with a sign, if the key is there.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, KeyError> {
        self.elements(key, |v| integer(key, v, "a number from -2^31 to 2^31-1"))
    }

    /// An array of finite f32 or f64, if the key is there.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, KeyError> {
        self.elements(key, |v| finite(key, v))
    }

    fn elements<T>(
        &self,
        key: &str,
        convert: impl Fn(&Value<'_>) -> Result<T, KeyError>,
    ) -> Result<Option<Vec<T>>, KeyError> {
        let Some(array) = self.array(key)? else {
            return Ok(None);
        };
        let all: Result<Vec<T>, KeyError> = array.iter().map(|v| convert(&v)).collect();
        all.map(Some).map_err(|e| match e {
            KeyError::Type { key, found, wanted } => KeyError::ElementType { key, found, wanted },
            e => e,
        })
    }

    /// One integer for each layer, if the key is there: an array of `n_layer`, or one number for all.
    pub fn u32_per_layer(&self, key: &str, n_layer: usize) -> Result<Option<Vec<u32>>, KeyError> {
        if !matches!(self.get(key), Some(Value::Array(_))) {
            let Some(v) = self.u32(key)? else {
                return Ok(None);
            };
            if n_layer > MAX_LAYERS {
                return Err(KeyError::Length { key: key.into(), found: 1, wanted: n_layer });
            }
            return Ok(Some(vec![v; n_layer]));
        }
        let all = self.u32s(key)?.unwrap_or_default();
        if all.len() != n_layer {
            return Err(KeyError::Length { key: key.into(), found: all.len(), wanted: n_layer });
        }
        Ok(Some(all))
    }
}

/// The same, for keys that the model can't do without.
macro_rules! required {
    ($($name:ident: $optional:ident($($arg:ident: $ty:ty),*) -> $out:ty;)*) => {
        impl Metadata {
            $(
                #[doc = concat!("As [`Metadata::", stringify!($optional), "`]; an error if the key is missing.")]
                pub fn $name(&self, key: &str $(, $arg: $ty)*) -> Result<$out, KeyError> {
                    self.$optional(key $(, $arg)*)?.ok_or_else(|| KeyError::Missing { key: key.into() })
                }
            )*
        }
    };
}

required! {
    required_u32: u32() -> u32;
    required_f32: f32() -> f32;
    required_str: str() -> &str;
    required_strings: strings() -> Strings<'_>;
    required_u32_per_layer: u32_per_layer(n_layer: usize) -> Vec<u32>;
}

fn wrong_type(key: &str, value: &Value<'_>, wanted: &'static str) -> KeyError {
    KeyError::Type { key: key.into(), found: value.value_type(), wanted }
}

fn integer<T: TryFrom<i128>>(key: &str, value: &Value<'_>, wanted: &'static str) -> Result<T, KeyError> {
    let v = value.as_integer().ok_or_else(|| wrong_type(key, value, wanted))?;
    T::try_from(v).map_err(|_| KeyError::Range { key: key.into(), value: v.to_string(), wanted })
}

fn finite(key: &str, value: &Value<'_>) -> Result<f32, KeyError> {
    const WANTED: &str = "a finite 32-bit float";
    let v = value.as_float().ok_or_else(|| wrong_type(key, value, WANTED))?;
    let v = v as f32;
    if !v.is_finite() {
        return Err(KeyError::Range { key: key.into(), value: v.to_string(), wanted: WANTED });
    }
    Ok(v)
}
