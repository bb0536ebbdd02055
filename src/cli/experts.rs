//! `oncall experts`: which experts a text uses, as a map of layers and experts.

use super::args::ModelArgs;
use super::figures::{Held, losses};
use super::run::answer;
use super::{Failure, output};
use crate::engine::{Account, GenerationParams};
use crate::gguf::{PartFile, printable};
use crate::moe::Losses;
use crate::session::sampler::SamplingParams;
use clap::Args;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::PathBuf;

/// Flags of `experts`.
#[derive(Args)]
#[command(
    after_help = "A row is a layer, a column one expert or a few neighbours; the darker, the more it was used: a blank was never used, ░ \
less than half as often as if all were used alike, ▒ about as often, ▓ up to three times, █ more. In colours an expert that is resident \
(in memory) in the end is green, with a dot where it wasn't used. A layer that uses hardly more experts than a token takes has collapsed: \
it is named.

Examples:
  oncall experts -m model.gguf \"Write a poem about the sea\"
  oncall experts -m model.gguf --memory 4GiB --svg map.svg"
)]
pub(super) struct ExpertsArgs {
    /// The text to go on from
    #[arg(value_name = "PROMPT", default_value = "Once upon a time")]
    prompt: String,
    /// Tokens to write
    #[arg(short = 'n', long = "predict", value_name = "N", default_value_t = 64)]
    n_predict: usize,
    /// Draw the map into this file too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// A layer's uses.
#[derive(Serialize)]
struct Layer {
    layer: usize,
    /// Of each expert.
    uses: Vec<u64>,
    /// Whether each is in a slot.
    resident: Vec<bool>,
    /// As many experts, used alike, would be as unpredictable: the exponential of the entropy.
    effective: f64,
    /// Hardly more experts than a token takes.
    collapsed: bool,
}

#[derive(Serialize)]
struct Map {
    model: String,
    n_expert: usize,
    n_expert_used: usize,
    tokens: usize,
    layers: Vec<Layer>,
    #[serde(flatten)]
    losses: Losses,
    #[serde(flatten)]
    held: Held,
}

pub(super) fn run(a: ExpertsArgs) -> Result<(), Failure> {
    // What can't be written is known before anything takes time.
    let picture = a.svg.as_deref().map(PartFile::replace).transpose()?;
    let engine = a.model.load()?;
    let Some(moe) = engine.config().moe.as_ref() else {
        return Err(Failure::new(format!("{} has no experts: every token uses all of it", a.model.name())));
    };
    let (n_expert, n_expert_used) = (moe.router.n_expert, moe.router.n_expert_used);
    let tokens = engine.tokenizer().encode(&a.prompt, true, true);
    let params = GenerationParams {
        sampling: SamplingParams { temp: 0.0, ..SamplingParams::default() },
        n_predict: Some(a.n_predict),
        ignore_eos: true,
        ..GenerationParams::default()
    };
    let mut session = engine.session();
    let mut account = Account::default();
    let mut bar = None;
    let written = answer(&mut session, &tokens, &params, &mut account, &mut |piece| {
        // From the first token on: until then the prompt's own bar is there.
        let bar = bar.get_or_insert_with(|| {
            let bar = output::bar("writing", "tokens");
            bar.set_length(a.n_predict as u64);
            bar
        });
        bar.inc(u64::from(piece.token.is_some()));
        Ok(())
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    written?;
    let uses = engine.expert_uses().unwrap_or_default();
    let layers = uses.chunks(n_expert).enumerate().map(|(i, of_layer)| layer(i, of_layer, n_expert_used));
    let map = Map {
        model: a.model.name(),
        n_expert,
        n_expert_used,
        tokens: session.n_computed(),
        layers: layers.filter(|l| l.uses.iter().any(|&n| n > 0)).collect(),
        losses: account.store().losses(),
        held: Held::now(&engine),
    };
    if a.json {
        output::json(&map)?;
    } else {
        let colour = std::io::stdout().is_terminal()
            && anstream::AutoStream::choice(&std::io::stdout()) != anstream::ColorChoice::Never;
        output::text(&draw(&map, output::width(), colour)?)?;
    }
    if let Some(mut file) = picture {
        file.write_all(svg(&map)?.as_bytes()).map_err(|e| file.error(e))?;
        file.commit()?;
    }
    if output::stopped() { Err(Failure::interrupted()) } else { Ok(()) }
}

fn layer(layer: usize, of_layer: &[(u64, bool)], n_expert_used: usize) -> Layer {
    let uses: Vec<u64> = of_layer.iter().map(|u| u.0).collect();
    let total: u64 = uses.iter().sum();
    let entropy: f64 = uses
        .iter()
        .filter(|&&n| n > 0)
        .map(|&n| {
            let p = n as f64 / total as f64;
            -p * p.ln()
        })
        .sum();
    let effective = entropy.exp();
    // Few tokens look collapsed whatever the router; twice as many uses as experts show something.
    let enough = total >= 2 * uses.len() as u64 && uses.len() > 2 * n_expert_used;
    Layer {
        layer,
        resident: of_layer.iter().map(|u| u.1).collect(),
        collapsed: enough && effective < 1.5 * n_expert_used as f64,
        effective,
        uses,
    }
}

/// How dark: the share of uses against that of all alike.
fn shade(uses: u64, n_merged: usize, total: u64, n_expert: usize) -> usize {
    if uses == 0 {
        return 0;
    }
    let ratio = uses as f64 * n_expert as f64 / (n_merged as f64 * total as f64);
    1 + [0.5, 1.5, 3.0].iter().filter(|&&limit| ratio >= limit).count()
}

const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];

/// The map for a terminal: neighbours share a column where it's narrow.
fn draw(map: &Map, width: usize, colour: bool) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let room = width.saturating_sub(5 + 3 + 28).max(8);
    let merged = map.n_expert.div_ceil(room);
    let heading = format!(
        "{}: {} a layer, {} used; {}{}",
        printable(&map.model),
        output::counted(map.n_expert, "expert"),
        map.n_expert_used,
        output::counted(map.tokens, "token"),
        if merged > 1 { format!("; a column is {merged} experts") } else { String::new() }
    );
    writeln!(out, "{}", output::wrap(&heading, width))?;
    let green = anstyle::AnsiColor::Green.on_default();
    for l in &map.layers {
        let total: u64 = l.uses.iter().sum();
        write!(out, "{:>4} |", l.layer)?;
        for (uses, here) in l.uses.chunks(merged).zip(l.resident.chunks(merged)) {
            let c = SHADES[shade(uses.iter().sum(), uses.len(), total, map.n_expert)];
            let here = 2 * here.iter().filter(|&&h| h).count() > here.len();
            // A green blank couldn't be seen.
            match (colour && here, c) {
                (true, ' ') => write!(out, "{green}·{green:#}")?,
                (true, c) => write!(out, "{green}{c}{green:#}")?,
                (false, c) => out.push(c),
            }
        }
        let (used, here) = (l.uses.iter().filter(|&&n| n > 0).count(), l.resident.iter().filter(|&&h| h).count());
        writeln!(out, "| {used:>4} used, {here:>4} resident{}", if l.collapsed { " !" } else { "" })?;
    }
    writeln!(out, "░ less than half of all alike, ▒ about that,\n▓ up to three times, █ more")?;
    if colour {
        writeln!(out, "{green}green{green:#}: resident (in memory), · unused")?;
    }
    if let Some(losses) = losses(map.losses) {
        writeln!(out, "{}", output::wrap(&losses, width))?;
    }
    for l in map.layers.iter().filter(|l| l.collapsed) {
        let collapsed = format!(
            "layer {}: routing has collapsed: {:.1} experts' worth of {} do the work; if the text is an ordinary one, the file \
             is damaged or badly quantised",
            l.layer, l.effective, map.n_expert
        );
        writeln!(out, "{}", output::wrap(&collapsed, width))?;
    }
    Ok(out)
}

/// The map as a picture.
fn svg(map: &Map) -> Result<String, std::fmt::Error> {
    const CELL: usize = 8;
    let (left, top) = (40, 24);
    let (w, h) = (left + CELL * map.n_expert + 8, top + CELL * map.layers.len() + 8);
    let escape = |s: &str| s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let mut out = String::new();
    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" font-family="sans-serif" font-size="10">"##
    )?;
    writeln!(out, r##"<rect width="{w}" height="{h}" fill="#fff"/>"##)?;
    let tokens = output::counted(map.tokens, "token");
    let title = format!("{}: uses of experts by {tokens}; outlined: resident", printable(&map.model));
    writeln!(out, r##"<text x="{left}" y="14">{}</text>"##, escape(&title))?;
    for (row, l) in map.layers.iter().enumerate() {
        let (y, total) = (top + CELL * row, l.uses.iter().sum::<u64>());
        writeln!(out, r##"<text x="4" y="{}">{}</text>"##, y + CELL, l.layer)?;
        for (e, (&uses, &here)) in l.uses.iter().zip(&l.resident).enumerate() {
            if uses == 0 && !here {
                continue;
            }
            // All alike are at a quarter; four times that is full.
            let ink = (uses as f64 * map.n_expert as f64 / total as f64 / 4.0).min(1.0);
            let frame = if here { r##" stroke="#2a2" stroke-width="0.7""## } else { "" };
            writeln!(
                out,
                r##"<rect x="{}" y="{y}" width="7" height="7" fill="#036" fill-opacity="{ink:.2}"{frame}><title>layer {} expert {e}: {uses}</title></rect>"##,
                left + CELL * e,
                l.layer
            )?;
        }
    }
    out.push_str("</svg>\n");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> Map {
        let of = |uses: &[u64]| uses.iter().map(|&n| (n, n > 3)).collect::<Vec<_>>();
        let layers = [of(&[20, 20, 1, 0, 0, 0, 0, 0]), of(&[5, 5, 5, 5, 5, 5, 5, 6])];
        Map {
            model: "a<b".into(),
            n_expert: 8,
            n_expert_used: 2,
            tokens: 20,
            layers: layers.iter().enumerate().map(|(i, l)| layer(i, l, 2)).collect(),
            losses: Losses { dropped: 3, ..Losses::default() },
            held: Held::default(),
        }
    }

    #[test]
    fn a_collapsed_layer_is_named_and_a_healthy_one_isn_t() {
        let m = map();
        assert!(m.layers[0].collapsed && !m.layers[1].collapsed);
        assert!((m.layers[1].effective - 8.0).abs() < 0.1);
        let text = draw(&m, 80, false).unwrap();
        assert!(text.contains("layer 0: routing has collapsed") && !text.contains("layer 1: "), "{text}");
        assert!(text.contains("   0 |██░     |    3 used,    2 resident !"), "{text}");
        assert!(text.contains("   1 |▒▒▒▒▒▒▒▒|"), "{text}");
        assert!(text.contains("░ less than half") && text.contains("lossy: uses of experts 3 dropped"), "{text}");
        assert!(!text.contains('\u{1b}') && draw(&m, 80, true).unwrap().contains('\u{1b}'));
    }

    #[test]
    fn what_is_in_a_slot_unused_is_seen() {
        let m = Map { layers: vec![layer(0, &[(9, false), (0, true), (0, false)], 2)], n_expert: 3, ..map() };
        let text = anstream::adapter::strip_str(&draw(&m, 80, true).unwrap()).to_string();
        assert!(text.contains("   0 |█· |") && text.contains("· unused"), "{text}");
        assert!(draw(&m, 80, false).unwrap().contains("   0 |█  |"));
    }

    #[test]
    fn a_narrow_terminal_merges_columns() {
        let wide = vec![(3u64, true); 128];
        let m = Map { n_expert: 128, layers: vec![layer(0, &wide, 2)], ..map() };
        for width in [20, 60, 80, 120, 200] {
            let text = draw(&m, width, false).unwrap();
            let longest = text.lines().skip(1).map(|l| l.chars().count()).max().unwrap();
            assert!(longest <= width.max(44), "{width}: {longest}\n{text}");
        }
    }

    #[test]
    fn the_picture_is_well_formed() {
        let s = svg(&map()).unwrap();
        assert!(s.starts_with("<svg") && s.ends_with("</svg>\n") && s.contains("a&lt;b"));
        assert_eq!(s.matches("<rect").count(), 1 + 3 + 8);
        assert_eq!(s.matches("stroke=").count(), 2 + 8);
    }
}
