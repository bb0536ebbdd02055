//! Micro-benchmarks of the matrix kernels, one thread: every format's `gemv` in GB/s of packed weights and `gemm` in operations
//! a second (a multiplication and an addition are two), beside what the core can do at most; and the team's regions.
//!
//! `cargo bench --bench kernels -- q4_k` runs those whose name contains `q4_k`; `-- gemm` all of `gemm`. `ONCALL_ISA` chooses
//! the instruction set.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use oncall::cpu::{Isa, Pages, Team};
use oncall::ops::matmul::{Acts, OutRows, Packed, Product, matmul_here, multiply_rate, pack};
use oncall::quant::{FORMATS, Format};
use std::hint::black_box;
use std::time::Duration;

const N_COLS: usize = 2048;
/// What stays in a second-level cache, and what doesn't stay in any.
const PLACES: [(&str, usize); 2] = [("cache", 256 << 10), ("memory", 64 << 20)];
/// Tokens of `gemm`: what rare and usual experts get of a prompt, and a full block.
const N_TOKENS: [usize; 4] = [8, 16, 64, 128];
/// Rows of `gemm`.
const N_ROWS: usize = 512;

/// A matrix of any weights, packed, in memory of its own.
struct Matrix {
    format: &'static Format,
    n_rows: usize,
    n_cols: usize,
    pages: Pages,
}

impl Matrix {
    fn new(format: &'static Format, n_rows: usize, n_cols: usize) -> Self {
        let n_bytes = format.row_bytes(n_cols as u64).expect("whole blocks") as usize * n_rows;
        let mut pages = Pages::new(n_bytes).expect("memory");
        // Bits that make neither infinities nor subnormal numbers of a scale, which some processors are slow with.
        pages.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 37 % 16 + 0x20) as u8);
        let mut packed = Pages::new(n_bytes).expect("memory");
        pack(format, isa(), n_rows, n_cols, &pages, &mut packed);
        Self { format, n_rows, n_cols, pages: packed }
    }

    /// As many whole groups of rows as `n_bytes` hold.
    fn of_size(format: &'static Format, n_bytes: usize) -> Self {
        let row = format.row_bytes(N_COLS as u64).expect("whole blocks") as usize;
        Self::new(format, (n_bytes / row).next_multiple_of(16), N_COLS)
    }

    /// Its product with all rows of `x`.
    fn times(&self, x: &Acts, out: &mut [f32]) {
        let w = Packed::new(self.format, isa(), self.n_rows, self.n_cols, &self.pages);
        let tokens: Vec<u32> = (0..x.n_tokens() as u32).collect();
        matmul_here(&mut Product::new(w, x, &tokens, OutRows::new(out, self.n_rows)));
    }
}

fn isa() -> Isa {
    Isa::get().unwrap_or_else(|e| panic!("{e}"))
}

fn acts(format: &Format, n_tokens: usize, n_cols: usize) -> Acts {
    let mut acts = Acts::new();
    acts.reset(n_tokens, n_cols, &[format.act]);
    for t in 0..n_tokens {
        let row: Vec<f32> = (0..n_cols).map(|k| ((k * 31 + t * 17) % 64) as f32 / 32.0 - 1.0).collect();
        acts.put(t, &row);
    }
    acts
}

fn gemv(g: &mut BenchmarkGroup<'_, WallTime>, format: &'static Format) {
    for (place, n_bytes) in PLACES {
        let w = Matrix::of_size(format, n_bytes);
        g.throughput(Throughput::Bytes(w.pages.len() as u64));
        for n_tokens in [1, 4] {
            let (x, mut out) = (acts(format, n_tokens, w.n_cols), vec![0.0; n_tokens * w.n_rows]);
            let id = BenchmarkId::new(format!("{}/{place}", format.name), n_tokens);
            g.bench_function(id, |b| b.iter(|| w.times(&x, black_box(&mut out))));
        }
    }
}

fn gemm(g: &mut BenchmarkGroup<'_, WallTime>, format: &'static Format) {
    let w = Matrix::new(format, N_ROWS, N_COLS);
    for n_tokens in N_TOKENS {
        let (x, mut out) = (acts(format, n_tokens, w.n_cols), vec![0.0; n_tokens * w.n_rows]);
        g.throughput(Throughput::Elements((2 * w.n_rows * w.n_cols * n_tokens) as u64));
        g.bench_function(BenchmarkId::new(format.name, n_tokens), |b| b.iter(|| w.times(&x, black_box(&mut out))));
    }
}

/// Interleaving experts' matrices, in bytes a second: rows that were just read, into slots that no cache holds.
fn packing(g: &mut BenchmarkGroup<'_, WallTime>, format: &'static Format) {
    let rows = Matrix::new(format, N_ROWS, N_COLS).pages;
    let mut slots = Pages::new(PLACES[1].1.next_multiple_of(rows.len())).expect("memory");
    let n_slots = slots.len() / rows.len();
    let mut slot = 0;
    g.throughput(Throughput::Bytes(rows.len() as u64));
    g.bench_function(format.name, |b| {
        b.iter(|| {
            let to = &mut slots[slot * rows.len()..][..rows.len()];
            pack(format, isa(), N_ROWS, N_COLS, black_box(&rows), to);
            slot = (slot + 1) % n_slots;
        });
    });
}

/// Quantising a row of activations, in activations a second.
fn quantise(g: &mut BenchmarkGroup<'_, WallTime>) {
    for name in ["q4_0", "q4_k"] {
        let format = oncall::quant::by_name(name).expect("a registered format");
        let row: Vec<f32> = (0..N_COLS).map(|k| (k % 64) as f32 / 32.0 - 1.0).collect();
        let mut acts = Acts::new();
        g.throughput(Throughput::Elements(N_COLS as u64));
        g.bench_function(format!("{:?}", format.act), |b| {
            b.iter(|| {
                acts.reset(1, N_COLS, &[format.act]);
                acts.put(0, black_box(&row));
            });
        });
    }
}

/// A parallel region that does next to nothing: what it costs to open and close one.
fn region(g: &mut BenchmarkGroup<'_, WallTime>) {
    for n_threads in [1, 2, 4] {
        let team = Team::new(n_threads).expect("threads");
        g.bench_function(BenchmarkId::new("region", n_threads), |b| {
            b.iter(|| {
                team.run(16, &|i| {
                    black_box(i);
                })
            })
        });
    }
}

/// What a core can do at most: read memory, and multiply bytes.
fn print_limits() {
    let mut data = Pages::new(PLACES[1].1).expect("memory");
    data.fill(1); // or all of it would be the one page of zeros
    let mut best = 0.0f64;
    for _ in 0..9 {
        let began = std::time::Instant::now();
        let (words, _) = data.as_chunks::<8>();
        black_box(words.iter().fold(0u64, |sum, w| sum.wrapping_add(u64::from_le_bytes(*w))));
        best = best.max(data.len() as f64 / began.elapsed().as_secs_f64());
    }
    let multiply = multiply_rate(isa(), Duration::from_millis(200));
    println!("{}: a core reads {:.1} GB/s and multiplies {:.0} GOP/s\n", isa(), best / 1e9, multiply / 1e9);
}

fn main() {
    print_limits();
    let mut c = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .sample_size(20)
        .configure_from_args();
    let mut g = c.benchmark_group("gemv");
    FORMATS.iter().for_each(|format| gemv(&mut g, format));
    g.finish();
    let mut g = c.benchmark_group("gemm");
    FORMATS.iter().for_each(|format| gemm(&mut g, format));
    g.finish();
    let mut g = c.benchmark_group("pack");
    FORMATS.iter().for_each(|format| packing(&mut g, format));
    g.finish();
    let mut g = c.benchmark_group("quantise");
    quantise(&mut g);
    g.finish();
    let mut g = c.benchmark_group("team");
    region(&mut g);
    g.finish();
    c.final_summary();
}
