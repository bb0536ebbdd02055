//! What a program does that has oncall in it: loads a model, writes an answer, changes the budget, writes several texts together.
//!
//! `cargo run --release --example embed -- [model.gguf]`; without a file it's the model that is built in.

use oncall::engine::{Engine, EngineError, EngineOptions, Event, Generation, GenerationParams, Memory, Request};
use oncall::session::template::Message;
use std::io::Write;
use std::path::Path;

fn main() -> Result<(), EngineError> {
    // Up to four texts together, each with room for a full context.
    let options = EngineOptions { n_sessions: 4, ..EngineOptions::default() };
    let engine = match std::env::args().nth(1) {
        Some(file) => Engine::load(Path::new(&file), &options, &|_done, _all| ())?,
        None => Engine::embedded(&options)?,
    };
    let params = GenerationParams { n_predict: Some(48), ..GenerationParams::default() };

    // One text, piece by piece. A chat goes on in the same session.
    let mut session = engine.session();
    session.feed(&prompt(&engine, "Tell me a story about a fox.")?, &mut |_n_done| true)?;
    let mut writing = Generation::new(&mut session, params.clone())?;
    while let Some(piece) = writing.next()? {
        print!("{}", piece.text);
        let _ = std::io::stdout().flush();
    }
    println!("\n({:?})", writing.finish());
    drop(session);

    // An app in the background gives memory back; nothing is loaded again, and what is written doesn't change.
    let bytes = engine.budget().least + (64 << 20);
    engine.set_memory_budget(Memory::Bytes(bytes))?;
    println!("within {} MiB from here on", bytes >> 20);

    // Several texts, which share each read of an expert.
    let mut streams = Vec::new();
    for who in ["a fox", "an owl", "two mice"] {
        let prompt = prompt(&engine, &format!("Tell me a story about {who}."))?;
        streams.push(engine.submit(Request { prompt, params: params.clone(), priority: 0 })?);
    }
    for stream in streams {
        for event in stream {
            match event {
                Event::Piece(piece) => print!("{}", piece.text),
                Event::Finished(finished) => println!("\n({:?})", finished.finish),
                Event::Failed(e) => println!("\nnot done: {e}"),
            }
        }
    }
    Ok(())
}

/// A question as the model's chat template has it, or as plain text.
fn prompt(engine: &Engine, question: &str) -> Result<Vec<u32>, EngineError> {
    match engine.chat_template()? {
        Some(template) => engine.chat_tokens(&template, &[Message::new("user", question)]),
        None => Ok(engine.tokenizer().encode(question, true, false)),
    }
}
