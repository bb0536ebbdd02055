//! Keys of each type, and what is said of wrong ones.

use super::*;

#[test]
fn any_integer_type_that_fits_is_taken() {
    let m = metadata(|w| {
        w.set("u8", 200u8).set("i8", -3i8).set("u16", 60000u16).set("i16", -300i16);
        w.set("u32", u32::MAX).set("i32", i32::MIN).set("u64", u64::MAX).set("i64", -1i64);
    });
    assert_eq!(m.u32("u8"), Ok(Some(200)));
    assert_eq!(m.u32("u16"), Ok(Some(60000)));
    assert_eq!(m.u32("u32"), Ok(Some(u32::MAX)));
    assert_eq!(m.i32("i8"), Ok(Some(-3)));
    assert_eq!(m.i32("i16"), Ok(Some(-300)));
    assert_eq!(m.i32("i32"), Ok(Some(i32::MIN)));
    assert_eq!(m.u64("u64"), Ok(Some(u64::MAX)));
    assert_eq!(m.i32("i64"), Ok(Some(-1)));
    for (key, value) in [("i8", "-3"), ("i64", "-1"), ("u64", "18446744073709551615")] {
        let error = m.u32(key).unwrap_err();
        assert!(matches!(&error, KeyError::Range { key: k, value: v, .. } if k == key && v == value));
    }
    assert!(matches!(m.i32("u32"), Err(KeyError::Range { .. })));
    assert!(matches!(m.u64("i64"), Err(KeyError::Range { .. })));
}

#[test]
fn a_wrong_type_is_named() {
    let m = metadata(|w| {
        w.set("text", "x").set("number", 1u32).set("float", 1f32).set("flag", true).set("list", vec![1u32]);
    });
    let cases = [
        (m.u32("text").map(drop), "key \"text\" is a string, a number from 0 to 2^32-1 was expected"),
        (m.u32("float").map(drop), "key \"float\" is an f32, a number from 0 to 2^32-1 was expected"),
        (m.u64("flag").map(drop), "key \"flag\" is a bool, a number from 0 to 2^64-1 was expected"),
        (m.i32("list").map(drop), "key \"list\" is an array, a number from -2^31 to 2^31-1 was expected"),
        (m.f32("number").map(drop), "key \"number\" is a u32, a finite 32-bit float was expected"),
        (m.bool("number").map(drop), "key \"number\" is a u32, a bool was expected"),
        (m.str("number").map(drop), "key \"number\" is a u32, a string was expected"),
        (m.strings("text").map(drop), "key \"text\" is a string, an array was expected"),
        (m.strings("list").map(drop), "key \"list\" is an array of which each element is a u32, a string was expected"),
        (
            m.f32s("list").map(drop),
            "key \"list\" is an array of which each element is a u32, a finite 32-bit float was expected",
        ),
    ];
    for (result, message) in cases {
        assert_eq!(result.unwrap_err().to_string(), message);
    }
}

#[test]
fn an_absent_key_is_none_or_an_error_that_names_it() {
    let m = metadata(|_| ());
    assert!(m.is_empty() && !m.contains("k") && m.get("k").is_none());
    assert_eq!(m.u32("k"), Ok(None));
    assert_eq!(m.f32("k"), Ok(None));
    assert_eq!(m.bool("k"), Ok(None));
    assert_eq!(m.str("k"), Ok(None));
    assert_eq!(m.u32s("k"), Ok(None));
    assert_eq!(m.u32_per_layer("k", 2), Ok(None));
    assert!(m.strings("k").unwrap().is_none());
    let missing = KeyError::Missing { key: "k".into() };
    assert_eq!(m.required_u32("k"), Err(missing.clone()));
    assert_eq!(m.required_str("k"), Err(missing.clone()));
    assert_eq!(m.required_u32_per_layer("k", 2), Err(missing.clone()));
    assert_eq!(m.required_strings("k").map(drop), Err(missing.clone()));
    assert!(missing.to_string().starts_with("key \"k\" is missing"));
}

#[test]
fn floats_are_finite() {
    let m = metadata(|w| {
        w.set("f32", 1.5f32).set("f64", 0.25f64).set("nan", f32::NAN).set("huge", 1e300f64);
        w.set("list", vec![1f32, f32::INFINITY]);
    });
    assert_eq!(m.required_f32("f32"), Ok(1.5));
    assert_eq!(m.required_f32("f64"), Ok(0.25));
    assert!(matches!(m.f32("nan"), Err(KeyError::Range { .. })));
    assert!(matches!(m.f32("huge"), Err(KeyError::Range { .. })));
    assert!(matches!(m.f32s("list"), Err(KeyError::Range { .. })));
}

#[test]
fn arrays_are_read() {
    let m = metadata(|w| {
        w.set("strings", ["a", "", "ça"]).set("i32s", vec![-1i32, 5]).set("u8s", vec![7u8, 8]);
        w.set("f32s", vec![0.5f32]).set("none", Vec::<String>::new());
        w.set("nested", vec![vec![1u16, 2], vec![3]]);
    });
    let strings = m.required_strings("strings").unwrap();
    assert_eq!(strings.len(), 3);
    assert_eq!(strings.collect::<Vec<_>>(), ["a", "", "ça"]);
    assert_eq!(m.i32s("i32s"), Ok(Some(vec![-1, 5])));
    assert!(matches!(m.u32s("i32s"), Err(KeyError::Range { .. })));
    assert_eq!(m.u32s("u8s"), Ok(Some(vec![7, 8])));
    assert_eq!(m.f32s("f32s"), Ok(Some(vec![0.5])));
    assert_eq!(m.required_strings("none").unwrap().len(), 0);
    let nested = m.array("nested").unwrap().unwrap();
    let inner: Vec<_> = nested.iter().map(|v| v.as_array().unwrap()).collect();
    assert_eq!(inner[0].iter().collect::<Vec<_>>(), [Value::U16(1), Value::U16(2)]);
    assert_eq!(inner[1].iter().collect::<Vec<_>>(), [Value::U16(3)]);
    assert_eq!(format!("{nested:?}"), "[Array([U16(1), U16(2)]), Array([U16(3)])]");
}

#[test]
fn one_number_or_one_for_each_layer() {
    let m = metadata(|w| {
        w.set("one", 8u32).set("each", vec![1u32, 2, 3]).set("text", "x");
    });
    assert_eq!(m.u32_per_layer("one", 3), Ok(Some(vec![8, 8, 8])));
    assert_eq!(m.u32_per_layer("each", 3), Ok(Some(vec![1, 2, 3])));
    let length = |found, wanted| KeyError::Length { key: "each".into(), found, wanted };
    assert_eq!(m.u32_per_layer("each", 4), Err(length(3, 4)));
    assert_eq!(m.u32_per_layer("each", 2), Err(length(3, 2)));
    assert!(matches!(m.u32_per_layer("text", 3), Err(KeyError::Type { .. })));
    // A lying layer count doesn't decide how much is allocated.
    assert!(matches!(m.u32_per_layer("one", usize::MAX), Err(KeyError::Length { .. })));
}

#[test]
fn keys_come_in_the_files_order() {
    let m = metadata(|w| {
        w.set("b", 1u8).set("a", "x").set("c", 2u8).set("b", 3u8);
    });
    let all: Vec<_> = m.iter().collect();
    assert_eq!(all, [("b", Value::U8(3)), ("a", Value::Str("x")), ("c", Value::U8(2))]);
    assert_eq!(m.len(), 3);
}
