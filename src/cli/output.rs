//! What the commands print with: stdout that may end early, bars, numbers with units, Ctrl-C.

use super::Failure;
use crate::gguf::printable;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// A code that no command ends with: stdout was closed.
pub(super) const BROKEN_PIPE: u8 = 255;

/// Writes to stdout at once.
pub(super) fn bytes(text: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text).and_then(|()| out.flush()).map_err(|e| match e.kind() {
        ErrorKind::BrokenPipe => Failure { message: String::new(), code: BROKEN_PIPE },
        _ => Failure::new(format!("writing to the standard output: {e}")),
    })
}

/// Writes text to stdout at once.
pub(super) fn text(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// Writes a value as one line of JSON.
pub(super) fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    text(&format!("{}\n", serde_json::to_string(value)?))
}

/// A line on stderr. If it can't be written there is nobody to tell, and the work goes on.
pub(super) fn tell(line: &str) {
    let _ = writeln!(anstream::stderr(), "{line}");
}

/// Lines about the work on stderr, dimmed in a terminal. Names of files in them do nothing to it.
pub(super) fn note(lines: &str) {
    let style = anstyle::Style::new().dimmed();
    tell(&format!("{style}{}{style:#}", for_stderr(&printable_lines(lines))));
}

/// Why a command failed, on stderr.
pub(super) fn error(why: &str) {
    let style = anstyle::AnsiColor::Red.on_default().bold();
    let line = for_stderr(&format!("error: {}", printable_lines(why)));
    tell(&format!("{style}error:{style:#}{}", &line["error:".len()..]));
}

/// Wraps lines at words where they are read in a terminal. Elsewhere a script may look for them.
fn for_stderr(lines: &str) -> String {
    if std::io::stderr().is_terminal() { wrap(lines, columns(std::io::stderr())) } else { lines.into() }
}

/// Columns where a terminal is as wide as most, or there's none.
const USUAL_COLUMNS: usize = 80;

/// How wide this terminal is.
#[cfg(unix)]
fn columns(stream: impl std::os::fd::AsFd) -> usize {
    terminal_size::terminal_size_of(stream).map_or(USUAL_COLUMNS, |s| usize::from(s.0.0))
}

#[cfg(windows)]
fn columns(stream: impl std::os::windows::io::AsHandle) -> usize {
    terminal_size::terminal_size_of(stream).map_or(USUAL_COLUMNS, |s| usize::from(s.0.0))
}

/// How wide what is printed to stdout may be.
pub(super) fn width() -> usize {
    columns(std::io::stdout())
}

/// Lines of at most `width` columns, cut at blanks: what comes after a cut stands as far in as its line, and a list's item as its text.
/// A word that's longer stays whole, so that it can be copied; lines that fit stay as they are.
pub(super) fn wrap(lines: &str, width: usize) -> String {
    let wrapped: Vec<String> = lines.split('\n').map(|line| wrap_line(line, width)).collect();
    wrapped.join("\n")
}

fn wrap_line(line: &str, width: usize) -> String {
    let fits = |text: &str| text.chars().count() <= width;
    if fits(line) {
        return line.into();
    }
    let text = line.trim_start();
    let indent = line.len() - text.len() + if text.starts_with("- ") { 2 } else { 0 };
    wrap_at(line, indent, width)
}

/// One line as several, of which all but the first stand `indent` columns in.
pub(super) fn wrap_at(line: &str, indent: usize, width: usize) -> String {
    // Between the words of a line that is aligned may be more blanks than one.
    let mut out = String::new();
    let mut column = 0;
    for word in line.split_inclusive(' ') {
        let n = word.trim_end().chars().count();
        if column > indent && column + n > width {
            out.truncate(out.trim_end().len());
            out += "\n";
            out += &" ".repeat(indent);
            column = indent;
        }
        // A blank that would begin a line.
        if n > 0 || column > indent || !out.contains('\n') {
            out += word;
            column += word.chars().count();
        }
    }
    // The last word's blanks.
    out.truncate(out.trim_end().len());
    out
}

fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// A progress bar on stderr, if that's a terminal, for what takes over a second: it appears after half of one.
pub(super) fn bar(what: &str, unit: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    let counts =
        if unit == "bytes" { "{bytes} of {total_bytes}".to_string() } else { format!("{{pos}} of {{len}} {unit}") };
    // What stands beside the bar takes up to so many columns; a line that reaches the edge couldn't be cleared after a `^C`.
    const BESIDE: usize = 45;
    let cells = columns(std::io::stderr()).saturating_sub(what.len() + BESIDE).clamp(1, 30);
    if let Ok(style) = ProgressStyle::with_template(&format!("{{msg}} {{bar:{cells}}} {counts}{{left}}")) {
        // Nothing is known before the first step.
        bar.set_style(style.with_key("left", |s: &ProgressState, out: &mut dyn std::fmt::Write| {
            if s.pos() > 0 {
                let _ = write!(out, ", {:#} left", HumanDuration(s.eta()));
            }
        }));
    }
    bar.set_message(what.to_string());
    if std::io::stderr().is_terminal() {
        let late = bar.downgrade();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(500));
            if let Some(bar) = late.upgrade().filter(|b| !b.is_finished()) {
                bar.set_draw_target(ProgressDrawTarget::stderr());
                // The first step may take long.
                bar.tick();
            }
        });
    }
    bar
}

static CAUGHT: AtomicBool = AtomicBool::new(false);
static STOPPED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Makes Ctrl-C end the program, without the files that aren't finished.
pub(super) fn handle_ctrl_c() -> Result<(), Failure> {
    on_signal(|| {
        if STOPPED.swap(true, SeqCst) || !CAUGHT.load(SeqCst) {
            crate::gguf::remove_unfinished();
            std::process::exit(130);
        }
    })
}

/// Calls `f` for each signal that asks the program to end.
#[cfg(unix)]
fn on_signal(f: impl Fn() + Send + 'static) -> Result<(), Failure> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = vec![SIGINT, SIGTERM];
    // `nohup` ignores it, so that a job outlives its terminal.
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    let mut signals = signal_hook::iterator::Signals::new(signals)?;
    std::thread::Builder::new().name("oncall-signals".into()).spawn(move || signals.forever().for_each(|_| f()))?;
    Ok(())
}

#[cfg(not(unix))]
fn on_signal(f: impl FnMut() + Send + 'static) -> Result<(), Failure> {
    ctrlc::set_handler(f)?;
    Ok(())
}

/// Whether the program was started with this signal ignored, where the system says so.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Makes the first Ctrl-C only ask for an end, for a command that looks whether it has [`stopped`].
pub(super) fn catch_ctrl_c() {
    CAUGHT.store(true, SeqCst);
}

/// What is true after Ctrl-C.
pub(super) fn stop() -> Arc<AtomicBool> {
    STOPPED.clone()
}

/// Whether Ctrl-C came since the last [`start_over`].
pub(super) fn stopped() -> bool {
    STOPPED.load(SeqCst)
}

/// Forgets a Ctrl-C.
pub(super) fn start_over() {
    STOPPED.store(false, SeqCst);
}

/// `1.5 GB`.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// `1.50 GiB`, as `--memory` takes it.
pub(super) fn memory(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// `1 token`, `2 tokens`.
pub(super) fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Memory that something takes at least: rounded up, so that who asks for what is printed gets enough.
pub(super) fn at_least(bytes: u64) -> String {
    let step = match bytes {
        0..1_048_576 => 102.4,
        1_048_576..1_073_741_824 => 104_857.6,
        _ => 10_737_418.24,
    };
    memory(((bytes as f64 / step).ceil() * step).ceil() as u64)
}

/// `7.25 B`, as models are counted.
pub(super) fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_at_words() {
        assert_eq!(wrap("short\n", 5), "short\n");
        assert_eq!(wrap("one two three", 7), "one two\nthree");
        assert_eq!(wrap("  - one two three", 9), "  - one\n    two\n    three");
        assert_eq!(wrap("a /a/very/long/name b", 8), "a\n/a/very/long/name\nb", "a name stays whole");
        assert_eq!(wrap("a  |  b", 7), "a  |  b", "what fits is left alone");
        assert_eq!(wrap_at("disk   one two", 7, 11), "disk   one\n       two");
        let text = "The disk is 29 times slower than memory: a model that fits writes faster. ".repeat(9);
        for width in 20..100 {
            let wrapped = wrap(&text, width);
            assert!(wrapped.lines().all(|l| l.chars().count() <= width), "{wrapped}");
            assert_eq!(wrapped.split_whitespace().collect::<Vec<_>>(), text.split_whitespace().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_least_size_is_rounded_up() {
        for (bytes, want) in [
            (212_302_592, "202.5 MiB"),
            (200 << 20, "200.0 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            ((1 << 30) + 1, "1.01 GiB"),
            (1, "0.1 KiB"),
        ] {
            assert_eq!(at_least(bytes), want);
        }
    }
}
