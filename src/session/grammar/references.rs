//! References within a JSON schema, as llguidance takes them: it looks each part of `#/a/b` up as it's written, whereas a reference is
//! percent-encoded and escaped (RFC 6901, sections 3 and 6), and finds nothing below a name with a `/`.

use super::{EMBEDDED, GrammarError, SCHEMA, check_len};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};

/// Writes references with escapes as llguidance looks them up. What can't be written so, because a name on the way has a `/`, is copied to
/// a definition of another name, once.
///
/// # Errors
/// A reference that leads out of the schema, has a wrong escape, or leads nowhere; a schema that is too long with the copies.
pub(super) fn resolve(schema: &mut Value) -> Result<(), GrammarError> {
    let (mut escaped, mut first_wrong) = (BTreeMap::new(), Ok(()));
    each_reference(schema, &mut |reference| match parts(reference) {
        Ok(Some(parts)) => drop(escaped.insert(reference.clone(), parts)),
        Err(why) if first_wrong.is_ok() => first_wrong = Err(wrong(reference, why)),
        _ => {}
    });
    first_wrong?;
    if escaped.is_empty() {
        return Ok(());
    }
    let mut len = schema.to_string().len();
    let mut copies: BTreeMap<&[String], (String, Value)> = BTreeMap::new();
    let mut rewritten: HashMap<&str, String> = HashMap::new();
    for (reference, parts) in &escaped {
        let to =
            find(schema, parts).ok_or_else(|| wrong(reference, "there is nothing in the schema where it leads"))?;
        if parts.iter().all(|part| !part.contains('/')) {
            rewritten.insert(reference, format!("#/{}", parts.join("/")));
            continue;
        }
        if !copies.contains_key(&**parts) {
            len += to.to_string().len();
            check_len(SCHEMA, len)?;
            copies.insert(parts, (fresh(schema, copies.len()), to.clone()));
        }
        rewritten.insert(reference, format!("#/$defs/{}", copies[&**parts].0));
    }
    if let (Value::Object(fields), false) = (&mut *schema, copies.is_empty()) {
        let Value::Object(defs) = fields.entry("$defs").or_insert_with(|| json!({})) else {
            return Err(GrammarError::Schema("$defs isn't an object".into()));
        };
        defs.extend(copies.into_values());
    }
    each_reference(schema, &mut |reference| {
        if let Some(written) = rewritten.get(&**reference) {
            reference.clone_from(written);
        }
    });
    Ok(())
}

/// A grammar in Lark whose schemas have such references. What can't be resolved stays, for llguidance to complain about where it's used.
pub(super) fn resolve_embedded(source: &str) -> String {
    let (mut out, mut rest) = (String::new(), source);
    while let Some((before, after)) = rest.split_once(EMBEDDED) {
        out += before;
        out += EMBEDDED;
        rest = after;
        let mut values = serde_json::Deserializer::from_str(after).into_iter::<Value>();
        if let Some(Ok(schema)) = values.next() {
            let mut resolved = schema.clone();
            if resolve(&mut resolved).is_ok() && resolved != schema {
                out += &format!(" {resolved}");
                rest = &after[values.byte_offset()..];
            }
        }
    }
    out + rest
}

/// What a path leads to, as llguidance finds it.
pub(super) fn find<S: AsRef<str>>(schema: &Value, parts: impl IntoIterator<Item = S>) -> Option<&Value> {
    parts.into_iter().try_fold(schema, |at, part| match at {
        Value::Array(list) => list.get(part.as_ref().parse::<usize>().ok()?),
        other => other.get(part.as_ref()),
    })
}

fn wrong(reference: &str, why: &str) -> GrammarError {
    GrammarError::Schema(format!("$ref {reference:?}: {why}"))
}

/// A name that no definition has.
fn fresh(schema: &Value, n: usize) -> String {
    let taken = |name: &str| schema.get("$defs").is_some_and(|defs| defs.get(name).is_some());
    let mut name = format!("copy {n}");
    while taken(&name) {
        name.push('\'');
    }
    name
}

/// A reference's parts without escapes; `None` if it has none.
fn parts(reference: &str) -> Result<Option<Vec<String>>, &'static str> {
    if reference == "#" {
        return Ok(None);
    }
    if !reference.starts_with('#') {
        return Err(
            "only references into the schema itself are supported, as \"#/$defs/name\"; put what it refers to into $defs",
        );
    }
    let Some(path) = reference.strip_prefix("#/") else {
        return Err("references to an anchor aren't supported: write the path, as \"#/$defs/name\"");
    };
    if !path.contains(['%', '~']) {
        return Ok(None);
    }
    let path = without_percent(path)
        .ok_or("a % in a reference begins a byte in two hexadecimal digits of UTF-8; % itself is %25")?;
    let part = |part: &str| {
        let whole = !part.replace("~0", "").replace("~1", "").contains('~');
        // In this order: ~01 is ~1.
        whole.then(|| part.replace("~1", "/").replace("~0", "~"))
    };
    let parts: Option<Vec<String>> = path.split('/').map(part).collect();
    parts.map(Some).ok_or("~ in a reference is written ~0, and / within a name ~1")
}

fn without_percent(text: &str) -> Option<String> {
    let (mut out, mut rest) = (Vec::new(), text.as_bytes());
    while let [byte, after @ ..] = rest {
        rest = after;
        match byte {
            b'%' => {
                let digit = |i: usize| char::from(*after.get(i)?).to_digit(16);
                out.push((digit(0)? * 16 + digit(1)?) as u8);
                rest = &after[2..];
            }
            byte => out.push(*byte),
        }
    }
    String::from_utf8(out).ok()
}

/// Keywords whose value is data, whatever is in it.
pub(super) const DATA: [&str; 4] = ["enum", "const", "default", "examples"];
/// Keywords whose value has schemas by names of the schema's author.
pub(super) const NAMED: [&str; 5] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];

/// Calls `f` for every reference in a schema.
fn each_reference(schema: &mut Value, f: &mut dyn FnMut(&mut String)) {
    match schema {
        Value::Object(fields) => of_fields(fields, f),
        Value::Array(list) => list.iter_mut().for_each(|v| each_reference(v, f)),
        _ => {}
    }
}

fn of_fields(fields: &mut Map<String, Value>, f: &mut dyn FnMut(&mut String)) {
    for (name, v) in fields {
        match v {
            Value::String(reference) if name == "$ref" => f(reference),
            Value::Object(named) if NAMED.contains(&&**name) => named.values_mut().for_each(|v| each_reference(v, f)),
            _ if DATA.contains(&&**name) => {}
            v => each_reference(v, f),
        }
    }
}
