//! `oncall chat` in a terminal, as somebody types there.

#![cfg(target_os = "linux")]

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A chat or another command, and the terminal that it runs in.
struct Chat {
    child: Child,
    keyboard: File,
    /// What was shown so far.
    screen: Arc<Mutex<String>>,
    /// How much of that was looked at.
    seen: usize,
}

impl Chat {
    fn new(args: &[&str]) -> Chat {
        Chat::at_home(args, None)
    }

    fn at_home(args: &[&str], home: Option<&Path>) -> Chat {
        let mut chat = Chat::start(&[&["chat"], args].concat(), home);
        chat.sees(">>> ");
        chat
    }

    /// Any command.
    fn start(args: &[&str], home: Option<&Path>) -> Chat {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let program = || -> Stdio {
            File::from(rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap()).into()
        };
        let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
        c.args(args).env_remove("ONCALL_MODEL").env_remove("ONCALL_LOG").env("TERM", "xterm");
        c.envs(home.iter().map(|h| ("HOME", *h)));
        let child = c.stdin(program()).stdout(program()).stderr(program()).spawn().unwrap();
        drop(c);
        let (keyboard, screen) = (File::from(terminal), Arc::new(Mutex::new(String::new())));
        let (mut from, to) = (keyboard.try_clone().unwrap(), screen.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Reading fails when the program has closed its side.
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                to.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        Chat { child, keyboard, screen, seen: 0 }
    }

    fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this is shown, and forgets what is before it.
    fn sees(&mut self, text: &str) {
        let began = Instant::now();
        loop {
            let screen = self.screen.lock().unwrap().clone();
            if let Some(at) = screen[self.seen..].find(text) {
                self.seen += at + text.len();
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(120), "no {text:?} in {:?}", &screen[self.seen..]);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn interrupt(&self) {
        Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap();
    }
}

impl Drop for Chat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn messages(path: &Path) -> Vec<(String, String)> {
    let v: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let text = |m: &serde_json::Value, key: &str| m[key].as_str().unwrap().to_string();
    v.as_array().unwrap().iter().map(|m| (text(m, "role"), text(m, "content"))).collect()
}

#[test]
fn blocks_are_messages_and_bye_has_other_names() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("said.json");
    let mut chat = Chat::new(&["-n", "2", "--temp", "0", "-s", "7"]);
    chat.types("\"\"\"/bye\r");
    chat.sees("... ");
    chat.types("now\"\"\" \r");
    chat.sees("seed 7");
    chat.sees(">>> ");
    // Ctrl-D ends a block, not the chat.
    chat.types("\"\"\"a dog\r");
    chat.sees("... ");
    chat.types("\u{4}");
    chat.sees("seed 7");
    chat.sees(">>> ");
    chat.types(&format!("/save {}\r", file.display()));
    chat.sees("saved to");
    let said: Vec<_> = messages(&file).into_iter().filter(|m| m.0 == "user").map(|m| m.1).collect();
    assert_eq!(said, ["/bye\nnow", "a dog"]);
    chat.sees(">>> ");
    chat.types("/quit now\r");
    assert!(chat.child.wait().unwrap().success());
}

#[test]
fn what_is_told_in_a_terminal_fits_into_it() {
    // Nobody said how wide this one is.
    let shown = |chat: &Chat| chat.screen.lock().unwrap().replace("\r\n", "\n");
    let fits = |text: &str| {
        let wide = text.lines().find(|l| anstream::adapter::strip_str(l).to_string().chars().count() > 80);
        assert!(wide.is_none(), "{wide:?}");
    };
    let mut chat = Chat::new(&["-n", "1"]);
    let before = shown(&chat).len();
    chat.types("/help\r");
    chat.sees("begin and end");
    chat.sees(">>> ");
    fits(&shown(&chat)[before..]);
    chat.types("/set nonsense\r");
    chat.sees("and system");
    chat.sees(">>> ");
    fits(&shown(&chat)[before..]);
    let mut failed = Chat::start(&["run", "x", "--memory", "2MiB"], None);
    assert_eq!(failed.child.wait().unwrap().code(), Some(1));
    failed.sees("error:");
    failed.sees("MiB");
    std::thread::sleep(Duration::from_millis(100));
    let text = shown(&failed);
    assert!(text.trim().lines().count() > 1, "{text}");
    fits(&text);
}

/// No shell is there to write it out.
#[test]
fn a_tilde_is_the_home() {
    let home = tempfile::tempdir().unwrap();
    let mut chat = Chat::at_home(&["-n", "1", "--temp", "0", "-s", "7"], Some(home.path()));
    chat.types("hi\r");
    chat.sees("seed 7");
    chat.sees(">>> ");
    chat.types("/save ~/said.json\r");
    chat.sees("saved to");
    chat.sees(">>> ");
    assert_eq!(messages(&home.path().join("said.json")).len(), 2);
    chat.types("/load ~/said.json\r");
    chat.sees("2 messages, ");
    chat.sees(">>> ");
    chat.types("/load ~/other.json\r");
    chat.sees("no such file");
}

#[test]
fn what_takes_long_shows_how_far_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = vec!["500"; 8_000].join(",");
    let logits = dir.path().join("logits");
    let args = ["logits", "--tokens", &tokens, "-c", "8000", "-t", "1", "-o", logits.to_str().unwrap()];
    let mut chat = Chat::start(&args, None);
    chat.sees("computing logits");
    chat.sees(" of 8000 tokens");
    drop(chat);
    let mut chat = Chat::start(&["experts", "-n", "20000", "-c", "30000", "-t", "1"], None);
    chat.sees("writing");
    chat.sees(" of 20000 tokens");
}

/// What is stopped before it was answered is as if it had never been said.
#[test]
fn a_message_whose_reading_is_stopped_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (dir.path().join("before.json"), dir.path().join("after.json"));
    // Long enough to be read for many seconds.
    let long = "once upon a time ".repeat(12_000);
    let talk = serde_json::json!([{"role": "user", "content": long}, {"role": "assistant", "content": "yes"}]);
    std::fs::write(&before, talk.to_string()).unwrap();
    let mut chat = Chat::new(&["-n", "2", "-s", "7", "-c", "100000", "-t", "1", "--ubatch-size", "16"]);
    chat.types(&format!("/load {}\r", before.display()));
    chat.sees("2 messages");
    chat.sees(">>> ");
    chat.types("hi\r");
    chat.sees("reading the prompt");
    chat.interrupt();
    chat.sees("wrote 0");
    chat.sees("taken back");
    chat.sees(">>> ");
    assert!(!chat.screen.lock().unwrap().contains("seed"), "nothing was drawn");
    chat.types(&format!("/save {}\r", after.display()));
    chat.sees("saved to");
    assert_eq!(messages(&after), messages(&before));
}

/// Whoever waits for a message from a pipe is ended by the first Ctrl-C.
#[test]
fn a_pipe_that_is_held_open_can_be_left() {
    let mut c = Command::new(env!("CARGO_BIN_EXE_oncall"));
    let mut child = c.arg("chat").stdin(Stdio::piped()).env_remove("ONCALL_MODEL").spawn().unwrap();
    // It may not have begun to read yet, which changes nothing.
    std::thread::sleep(Duration::from_millis(300));
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(60), "it goes on waiting");
        std::thread::sleep(Duration::from_millis(10));
    }
}
