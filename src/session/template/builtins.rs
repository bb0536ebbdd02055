//! What a template can call: minijinja's filters and Python's methods as the Hugging Face library offers them, each paid for.

use std::sync::Arc;

use minijinja::filters;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::meter::{Cause, Meter};
use super::{clock, guard, json};

/// The longest number in a format's width or precision.
const MAX_WIDTH_DIGITS: usize = 3;

/// An environment for one rendering, which pays from `meter` and takes the time to be `now` (seconds since 1970).
pub(super) fn environment(meter: &Arc<Meter>, now: i64) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_debug(true);
    guards(&mut env, meter);
    products(&mut env, meter);
    searches(&mut env, meter);
    hugging_face(&mut env, meter, now);
    // They can make much of little, Jinja's own have other rules, and no chat template was found that uses them.
    for name in ["sum", "pprint", "chain", "zip", "batch", "slice"] {
        env.remove_filter(name);
    }
    let m = meter.clone();
    env.set_unknown_method_callback(move |state, value, name, args| method(&m, state, value, name, args));
    let m = meter.clone();
    env.set_formatter(move |out, state, value| {
        m.spend(m.read(value)?.printed())?;
        minijinja::escape_formatter(out, state, value)
    });
    env
}

/// What [`guard`] puts around operations.
fn guards(env: &mut Environment<'static>, meter: &Arc<Meter>) {
    let m = meter.clone();
    env.add_filter(guard::FRESH, move |value: Value| m.fresh(value));
    let m = meter.clone();
    env.add_filter(guard::JOINED, move |value: Value| m.joined(value));
    let m = meter.clone();
    env.add_filter(guard::READ, move |value: Value| m.read(&value).map(|_| value));
    let m = meter.clone();
    env.add_filter(guard::PLAIN, move |value: Value| m.read_plain(&value).map(|()| value));
    let m = meter.clone();
    env.add_filter(guard::APART, move |value: Value| {
        m.take_apart(&value)?;
        match value.as_str() {
            // minijinja's loop over a text doesn't know its last character.
            Some(text) => Ok(text.chars().map(Value::from).collect()),
            None if value.is_none() => Err(Error::new(ErrorKind::InvalidOperation, "none is not iterable")),
            None => Ok(value),
        }
    });
    let m = meter.clone();
    env.add_filter(guard::TEXT, move |value: Value| match value.as_str() {
        Some(text) => m.look(text.len() as u64 / 16).map(|()| value),
        None => Ok(value),
    });
    env.add_filter(guard::RAW, |value: Value| value);
    let m = meter.clone();
    env.add_filter(guard::SLICE, move |value: Value, start: Value, stop: Value, step: Value| {
        slice(&m, &value, &start, &stop, &step)
    });
    let m = meter.clone();
    env.add_filter(guard::MUL, move |a: Value, b: Value| multiply(&m, &a, &b));
}

/// Python's slices of texts (by character), lists and tuples.
fn slice(meter: &Meter, value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Error> {
    let bound = |v: &Value| match v.as_i64() {
        _ if v.is_none() => Ok(None),
        Some(n) => Ok(Some(n)),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("a slice's bounds are numbers, not {}", v.kind()))),
    };
    if let Some(text) = value.as_str() {
        meter.spend_len(text.len())?;
        let chars: Vec<char> = text.chars().collect();
        let picked = indices(chars.len(), bound(start)?, bound(stop)?, bound(step)?)?;
        return Ok(Value::from(picked.map(|i| chars[i]).collect::<String>()));
    }
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("{} can't be sliced", value.kind())));
    }
    meter.spend_product(value.len().unwrap_or(1), 32)?;
    let items: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
    let picked = indices(items.len(), bound(start)?, bound(stop)?, bound(step)?)?;
    let picked: Vec<Value> = picked.map(|i| items[i].clone()).collect();
    Ok(if value.is_tuple() { Value::from(minijinja::value::Tuple::new(picked)) } else { Value::from(picked) })
}

/// Which of `len` items a slice takes, as `slice.indices` of Python has it.
fn indices(
    len: usize,
    start: Option<i64>,
    stop: Option<i64>,
    step: Option<i64>,
) -> Result<impl Iterator<Item = usize>, Error> {
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(Error::new(ErrorKind::InvalidOperation, "a slice's step can't be 0"));
    }
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let (lowest, highest) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clip = |n: i64| if n < 0 { n.saturating_add(len).max(lowest) } else { n.min(highest) };
    let first = start.map_or(if step > 0 { lowest } else { highest }, clip);
    let end = stop.map_or(if step > 0 { highest } else { lowest }, clip);
    let inside = move |&i: &i64| if step > 0 { i < end } else { i > end };
    let next = move |i: &i64| i.checked_add(step);
    Ok(std::iter::successors(Some(first), next).take_while(inside).map(|i| i as usize))
}

/// Numbers multiplied, a text or list repeated.
fn multiply(meter: &Meter, a: &Value, b: &Value) -> Result<Value, Error> {
    let fail = || {
        let detail = format!("tried to multiply {} and {}", a.kind(), b.kind());
        Error::new(ErrorKind::InvalidOperation, detail)
    };
    let number = |v: &Value| v.is_number() || v.kind() == ValueKind::Bool;
    if number(a) && number(b) {
        if let (Ok(x), Ok(y)) = (i128::try_from(a.clone()), i128::try_from(b.clone()))
            && a.is_integer()
            && b.is_integer()
        {
            return x.checked_mul(y).map(Value::from).ok_or_else(fail);
        }
        let (x, y) = (f64::try_from(a.clone())?, f64::try_from(b.clone())?);
        return Ok(Value::from(x * y));
    }
    let (what, times) = if number(b) { (a, b) } else { (b, a) };
    let n = usize::try_from(times.as_i64().ok_or_else(fail)?.max(0)).unwrap_or(usize::MAX);
    if let Some(text) = what.as_str() {
        meter.spend_product(text.len(), n)?;
        return Ok(Value::from(text.repeat(n)));
    }
    if !matches!(what.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Err(fail());
    }
    let items: Vec<Value> = what.try_iter()?.checked().collect::<Result<_, _>>()?;
    meter.spend_product(items.len().saturating_mul(32), n)?;
    Ok(Value::from((0..n).flat_map(|_| items.iter().cloned()).collect::<Vec<_>>()))
}

/// Filters whose result can be as long as the product of their inputs: paid for before they run.
fn products(env: &mut Environment<'static>, meter: &Arc<Meter>) {
    let m = meter.clone();
    env.add_filter("replace", move |text: String, old: String, new: String, count: Option<i64>| {
        replace(&m, &text, &old, &new, count)
    });
    let m = meter.clone();
    env.add_filter(
        "join",
        move |state: &mut State,
              value: &Value,
              joiner: Option<StringInput<'_>>,
              attribute: Option<&str>,
              kwargs: Kwargs| {
            let by_name = kwargs.get::<Option<&str>>("d")?.unwrap_or_default();
            let len = joiner.as_ref().map_or(by_name.len(), |j| j.as_str().len());
            pay_join(&m, value, len)?;
            filters::join(state, value, joiner, attribute, kwargs)
        },
    );
    let m = meter.clone();
    env.add_filter(
        "indent",
        move |value: StringInput<'_>,
              width: Option<usize>,
              first: Option<bool>,
              blank: Option<bool>,
              kwargs: Kwargs| {
            let by_name = kwargs.get::<Option<usize>>("width")?;
            m.spend_product(value.as_str().lines().count() + 1, width.or(by_name).unwrap_or(4))?;
            filters::indent(value, width, first, blank, kwargs)
        },
    );
    let m = meter.clone();
    env.add_filter("format", move |state: &mut State, text: &Value, args: Rest<ValueOrKwargs>| {
        pay_format(&m, text.as_str().unwrap_or_default(), args.iter().map(|a| &**a))?;
        filters::format(state, text, args)
    });
}

fn replace(meter: &Meter, text: &str, old: &str, new: &str, count: Option<i64>) -> Result<Value, Error> {
    let found = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() };
    let n = count.map_or(found, |c| usize::try_from(c).map_or(found, |c| c.min(found)));
    meter.spend_len(text.len())?;
    meter.spend_product(n, new.len())?;
    Ok(Value::from(text.replacen(old, new, n)))
}

fn pay_join(meter: &Meter, value: &Value, joiner: usize) -> Result<(), Error> {
    let weight = meter.read(value)?;
    meter.spend(weight.printed())?;
    meter.take_apart(value)?;
    let n = value.as_str().map_or_else(|| value.len().unwrap_or(0), str::len);
    meter.spend_product(n, joiner)
}

/// Widths are limited, and each place of the format is paid for as if it took the longest argument.
fn pay_format<'a>(meter: &Meter, format: &str, args: impl Iterator<Item = &'a Value>) -> Result<(), Error> {
    let mut longest = 10u64.pow(MAX_WIDTH_DIGITS as u32);
    for arg in args {
        longest = longest.max(meter.read(arg)?.printed());
    }
    let mut digits = 0;
    let (mut open, mut after_percent) = (0, false);
    for c in format.chars() {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        open = match c {
            '{' => open + 1,
            '}' => 0,
            _ => open,
        };
        let computed_width = (c == '*' && after_percent) || (c == '{' && open > 2);
        if digits > MAX_WIDTH_DIGITS || computed_width {
            let detail = format!("a format's width must be written out, with at most {MAX_WIDTH_DIGITS} digits");
            return Err(Error::new(ErrorKind::InvalidOperation, detail));
        }
        after_percent = c == '%' || (after_percent && "-+ #0.123456789".contains(c));
    }
    let places = format.matches(['%', '{']).count();
    meter.spend_product(places, usize::try_from(longest).unwrap_or(usize::MAX))
}

/// Filters that run a test or another filter on each item: its arguments are read once for each.
fn searches(env: &mut Environment<'static>, meter: &Arc<Meter>) {
    fn pay(meter: &Meter, value: &Value, args: &[ValueOrKwargs]) -> Result<(), Error> {
        let n = value.as_str().map_or_else(|| value.len().unwrap_or(0), str::len);
        meter.take_apart(value)?;
        for arg in args {
            let arg: &Value = arg;
            if !arg.is_kwargs() {
                let weight = meter.read(arg)?;
                meter.look((n as u64).saturating_mul(weight.printed() / 16))?;
            }
        }
        Ok(())
    }
    type Test<'a> = Option<std::borrow::Cow<'a, str>>;
    macro_rules! each {
        ($($name:ident),*) => {$(
            let m = meter.clone();
            env.add_filter(stringify!($name), move |state: &mut State, value: Value, test: Test<'_>, args: Rest<ValueOrKwargs>| {
                pay(&m, &value, &args)?;
                filters::$name(state, value, test, args)
            });
        )*};
    }
    macro_rules! each_attribute {
        ($($name:ident),*) => {$(
            let m = meter.clone();
            env.add_filter(stringify!($name), move |state: &mut State, value: Value, attribute: std::borrow::Cow<'_, str>, test: Test<'_>, args: Rest<ValueOrKwargs>| {
                pay(&m, &value, &args)?;
                filters::$name(state, value, attribute, test, args)
            });
        )*};
    }
    each!(select, reject);
    each_attribute!(selectattr, rejectattr);
    let m = meter.clone();
    env.add_filter("map", move |state: &mut State, value: Value, args: Rest<ValueOrKwargs>| {
        pay(&m, &value, &args)?;
        filters::map(state, value, args)
    });
}

/// What the Hugging Face library adds to Jinja.
fn hugging_face(env: &mut Environment<'static>, meter: &Arc<Meter>, now: i64) {
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Cause::Refused(message).into())
    });
    env.add_function("strftime_now", move |format: String| {
        clock::strftime(&format, now).map_err(|directive| {
            let detail = format!("strftime_now doesn't know `{directive}`");
            Error::new(ErrorKind::InvalidOperation, detail)
        })
    });
    let m = meter.clone();
    // minijinja iterates over none as over nothing; to Python it is an error, and templates ask before.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_filter("tojson", move |value: &Value, args: Rest<ValueOrKwargs>| to_json(&m, value, args));
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
fn to_json(meter: &Meter, value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    type Args = (Option<Value>, Option<Value>, Option<Value>, Option<Value>, Kwargs);
    let (ensure_ascii, indent, separators, sort_keys, kwargs): Args = from_args(&args)?;
    let given = |positional: Option<Value>, name: &str| -> Result<Value, Error> {
        let value = match positional {
            Some(value) => Some(value),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.unwrap_or(Value::from(())))
    };
    let indent = given(indent, "indent")?;
    let indent = match (indent.as_str(), indent.as_i64()) {
        _ if indent.is_none() => None,
        (Some(text), _) => Some(text.to_owned()),
        (None, Some(n)) => {
            let n = usize::try_from(n).unwrap_or(0);
            meter.spend_len(n)?;
            Some(" ".repeat(n))
        }
        _ => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: `indent` must be a number or a text")),
    };
    let separators = given(separators, "separators")?;
    let separators = if separators.is_none() {
        ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned())
    } else {
        (separators.get_item_by_index(0)?.to_string(), separators.get_item_by_index(1)?.to_string())
    };
    let ensure_ascii = given(ensure_ascii, "ensure_ascii")?.is_true();
    let sort_keys = given(sort_keys, "sort_keys")?.is_true();
    kwargs.assert_all_used()?;
    json::dumps(value, &json::Style { ensure_ascii, indent, separators, sort_keys }, meter).map(Value::from)
}

/// Python's methods: those of minijinja-contrib, and a few that it lacks.
fn method(meter: &Meter, state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        meter.read(value)?;
        return unknown_method_callback(state, value, name, args);
    };
    // A method may take a text apart, and may triple its length in another case.
    meter.spend_product(text.len(), if matches!(name, "split" | "splitlines" | "rsplit") { 32 } else { 3 })?;
    match name {
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            return replace(meter, text, old, new, count);
        }
        "join" => pay_join(meter, args.first().unwrap_or(&Value::UNDEFINED), text.len())?,
        "format" => pay_format(meter, text, args.iter())?,
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            return partition(text, separator, name == "rpartition");
        }
        "rsplit" if !args.is_empty() => {
            let (separator, most): (&str, Option<i64>) = from_args(args)?;
            return rsplit(text, separator, most);
        }
        _ => {}
    }
    unknown_method_callback(state, value, name, args)
}

fn empty_separator() -> Error {
    Error::new(ErrorKind::InvalidOperation, "empty separator")
}

fn partition(text: &str, separator: &str, from_right: bool) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(empty_separator());
    }
    let at = if from_right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match at {
        Some((before, after)) => [before, separator, after],
        None if from_right => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(minijinja::value::Tuple::from(parts.map(Value::from))))
}

fn rsplit(text: &str, separator: &str, most: Option<i64>) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(empty_separator());
    }
    let most = most.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
    let mut parts: Vec<Value> = text.rsplitn(most, separator).map(Value::from).collect();
    parts.reverse();
    Ok(Value::from(parts))
}
