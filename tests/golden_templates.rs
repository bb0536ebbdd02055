//! Chat templates against Python's Jinja: the expected texts were written by `tests/golden/make_templates.py`.

use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use oncall::session::template::{ChatTemplate, Message, TemplateError};
use serde_json::Value as Json;

fn read(path: &Path) -> Json {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn messages(list: &Json) -> Vec<Message> {
    let message = |m: &Json| {
        let mut extra = m.as_object().unwrap().clone();
        let role = extra.remove("role").unwrap();
        // A content that isn't a text is a further field, as the type says.
        let content = match extra.get("content") {
            Some(Json::String(_)) => extra.shift_remove("content").unwrap(),
            _ => Json::String(String::new()),
        };
        Message { extra, ..Message::new(role.as_str().unwrap(), content.as_str().unwrap()) }
    };
    list.as_array().unwrap().iter().map(message).collect()
}

/// What differs between Python's result and ours; `None` if nothing does.
fn difference(expected: &Json, got: &Result<String, TemplateError>) -> Option<String> {
    if let Some(text) = expected.get("text") {
        return match got {
            Ok(got) if got == text => None,
            Ok(got) => Some(format!("expected {text}\n     got {}", Json::from(got.as_str()))),
            Err(e) => Some(format!("expected {text}\n     got the error: {e}")),
        };
    }
    match (expected.get("refused"), got) {
        (Some(refused), Err(TemplateError::Refused { message, .. })) if message == refused => None,
        (None, Err(TemplateError::Render { .. })) => None,
        _ => Some(format!("expected {expected}, got {got:?}")),
    }
}

/// Compares one template; returns how many results were equal and what was not.
fn compare(source: &str, inputs: &Json, golden: &Json) -> (usize, Vec<String>) {
    let text = |name: &str| inputs[name].as_str().unwrap();
    let template = match ChatTemplate::new(source, text("bos"), text("eos")) {
        Ok(template) => template.at(UNIX_EPOCH + Duration::from_secs(inputs["now"].as_u64().unwrap())),
        Err(_) if golden.get("syntax").is_some() => return (1, vec![]),
        Err(e) => return (0, vec![e.to_string()]),
    };
    if let Some(error) = golden.get("syntax") {
        return (0, vec![format!("it should not be a template: {error}")]);
    }
    let (mut equal, mut differences) = (0, Vec::new());
    for (name, conversation) in inputs["conversations"].as_object().unwrap() {
        for (variant, variables) in inputs["variants"].as_object().unwrap() {
            let mut variables = variables.clone();
            let prompt = variables.as_object_mut().unwrap().remove("add_generation_prompt").unwrap().as_bool().unwrap();
            let got = template.render(&messages(conversation), prompt, &variables);
            let case = format!("{name}/{variant}");
            match difference(&golden["results"][&case], &got) {
                None => equal += 1,
                Some(difference) => differences.push(format!("{case}: {difference}")),
            }
        }
    }
    (equal, differences)
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut found: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    found.retain(|p| p.extension().is_some_and(|e| e == extension));
    found.sort();
    found
}

#[test]
fn the_house_templates_render_as_in_python() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/templates");
    let inputs = read(&folder.join("conversations.json"));
    let templates = files(&folder, "jinja");
    assert!(templates.len() >= 10, "the templates are missing from {}", folder.display());
    let mut total = 0;
    for path in templates {
        let source = std::fs::read_to_string(&path).unwrap();
        let (equal, differences) = compare(&source, &inputs, &read(&path.with_extension("json")));
        assert!(differences.is_empty(), "{}:\n{}", path.display(), differences.join("\n"));
        total += equal;
    }
    println!("{total} texts equal");
}

/// Templates of public models, which aren't in the repository: `make_templates.py IN OUT`, then `ONCALL_GOLDEN_TEMPLATES=OUT`.
#[test]
fn other_templates_render_as_in_python() {
    let Some(folder) = std::env::var_os("ONCALL_GOLDEN_TEMPLATES") else {
        println!("skipped: ONCALL_GOLDEN_TEMPLATES isn't set");
        return;
    };
    let mut all = Vec::new();
    let mut total = 0;
    for path in files(Path::new(&folder), "json") {
        let golden = read(&path);
        let (equal, differences) = compare(golden["source"].as_str().unwrap(), &golden, &golden);
        total += equal;
        all.extend(differences.iter().map(|d| format!("{}: {d}", path.file_stem().unwrap().display())));
    }
    assert!(all.is_empty(), "{total} equal, {} not:\n{}", all.len(), all.join("\n"));
    println!("{total} texts equal");
}
