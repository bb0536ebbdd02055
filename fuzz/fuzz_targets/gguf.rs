//! Any bytes are a GGUF header that can be trusted, or an error.
#![no_main]

use std::borrow::Cow;

use libfuzzer_sys::fuzz_target;
use oncall::gguf::{Header, Metadata};

fuzz_target!(|input: &[u8]| {
    // The first byte says how much longer than its beginning the file is, so that tensors find room.
    let Some((&longer, bytes)) = input.split_first() else { return };
    let file_len = bytes.len() as u64 + (u64::from(longer) << 8);
    match Header::parse(Cow::Owned(bytes.to_vec()), file_len) {
        Ok(header) => {
            walk(&header.metadata);
            for t in &header.tensors {
                assert!(t.offset >= header.n_bytes as u64 && t.offset + t.n_bytes <= file_len);
                assert_eq!(t.format.row_bytes(t.n_cols()).unwrap() * t.n_rows(), t.n_bytes);
            }
        }
        Err(error) => assert!(error.to_string().len() < 4096),
    }
});

/// Every getter on every key: whatever its type is, no more than an error.
fn walk(metadata: &Metadata) {
    assert_eq!(metadata.iter().count(), metadata.len());
    for (key, value) in metadata.iter() {
        assert_eq!(metadata.get(key).unwrap().value_type(), value.value_type());
        let _ = (metadata.u32(key), metadata.u64(key), metadata.i32(key), metadata.f32(key));
        let _ = (metadata.bool(key), metadata.str(key));
        let _ = (metadata.u32s(key), metadata.i32s(key), metadata.f32s(key), metadata.u32_per_layer(key, 3));
        if let Ok(Some(array)) = metadata.array(key) {
            assert_eq!(array.iter().count(), array.len());
            assert!(!format!("{array:?}").is_empty());
        }
        if let Ok(Some(strings)) = metadata.strings(key) {
            let n = strings.len();
            assert_eq!(strings.count(), n);
        }
    }
}
