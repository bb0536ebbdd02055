//! The safe way into the kernels: matrices, places for results, and the checks that make it safe.

use std::marker::PhantomData;
use std::ops::Range;

use super::acts::Acts;
use super::job::{Act, Ask, Job, MAX_TOKENS};
use super::{Kernels, MAX_GEMV, number};
use crate::cpu::{Isa, Team};
use crate::quant::{ActKind, Format};

/// A matrix of weights as the kernels of one instruction set read it, see [`pack`].
///
/// Rows are in groups, the unit of work that is handed to threads. Rows beyond the last full group form one more.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    format: &'static Format,
    isa: Isa,
    kernels: &'static Kernels,
    n_rows: usize,
    n_cols: usize,
    row_bytes: usize,
    data: &'a [u8],
}

/// The kernels and the bytes of a row.
fn kernels_of(format: &'static Format, isa: Isa, n_cols: usize) -> (&'static Kernels, usize) {
    assert!(isa.is_available(), "this processor lacks {isa}");
    let kernels = (format.kernels)(isa).expect("an available instruction set has its kernels");
    let row_bytes = format.row_bytes(n_cols as u64).and_then(|n| usize::try_from(n).ok());
    (kernels, row_bytes.unwrap_or_else(|| panic!("{n_cols} weights aren't whole blocks of {format:?}")))
}

/// Brings the rows of a file into the order that the kernels of an instruction set read. Both take the same room.
///
/// # Panics
/// If the processor lacks the instruction set, or either isn't `n_rows` whole rows.
pub fn pack(format: &'static Format, isa: Isa, n_rows: usize, n_cols: usize, rows: &[u8], packed: &mut [u8]) {
    let (kernels, row_bytes) = kernels_of(format, isa, n_cols);
    assert!(n_rows.checked_mul(row_bytes) == Some(rows.len()) && packed.len() == rows.len());
    let group_bytes = kernels.lanes * row_bytes;
    if group_bytes == 0 {
        return;
    }
    let (whole, rest) = rows.split_at(rows.len() / group_bytes * group_bytes);
    let (groups, last) = packed.split_at_mut(whole.len());
    for (rows, group) in whole.chunks_exact(group_bytes).zip(groups.chunks_exact_mut(group_bytes)) {
        // SAFETY: `kernels_of` has checked that the processor has the instruction set.
        unsafe { (kernels.pack)(rows, group) };
    }
    last.copy_from_slice(rest);
}

/// Bytes that each thread keeps for itself once it has multiplied many tokens with matrices of at most `n_cols` columns: AMX wants the
/// tokens gathered.
pub fn scratch_bytes(isa: Isa, n_cols: usize) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Amx => super::on_amx::scratch_bytes(n_cols),
        _ => {
            let _ = n_cols; // unused where there is no AMX
            0
        }
    }
}

/// How matrices of a format are multiplied on an instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// What kind of format the kernels are written for: `block32`, `superblock` or `number`.
    pub kind: &'static str,
    /// Rows that lie interleaved, one a lane.
    pub lanes: usize,
    /// Up to so many tokens are multiplied by one pass of `gemv`,
    pub gemv: usize,
    /// up to so many by several of them, and more by `gemm`,
    pub few: usize,
    /// which keeps the sums of so many tokens and groups of rows in registers.
    pub tile: (usize, usize),
}

impl Chosen {
    /// `None` if there are no kernels for this instruction set on this machine.
    pub fn of(format: &Format, isa: Isa) -> Option<Self> {
        let k = (format.kernels)(isa)?;
        Some(Self { kind: k.kind, lanes: k.lanes, gemv: MAX_GEMV, few: k.few, tile: k.tile })
    }
}

impl<'a> Packed<'a> {
    /// A matrix `(n_rows, n_cols)` that [`pack`] has prepared for the same instruction set.
    ///
    /// # Panics
    /// If the processor lacks the instruction set, or the data isn't `n_rows` whole rows.
    pub fn new(format: &'static Format, isa: Isa, n_rows: usize, n_cols: usize, data: &'a [u8]) -> Self {
        let (kernels, row_bytes) = kernels_of(format, isa, n_cols);
        assert_eq!(Some(data.len()), n_rows.checked_mul(row_bytes));
        Self { format, isa, kernels, n_rows, n_cols, row_bytes, data }
    }

    /// The weights' format.
    pub fn format(&self) -> &'static Format {
        self.format
    }

    /// Rows, which are outputs.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns, which are inputs.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Groups of rows.
    pub fn n_groups(&self) -> usize {
        self.n_rows.div_ceil(self.kernels.lanes)
    }
}

/// Where the results of a token block go: rows of tokens, columns of outputs.
pub struct OutRows<'a> {
    data: *mut f32,
    n_rows: usize,
    n_cols: usize,
    stride: usize,
    lives: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a slice that is borrowed to be written.
unsafe impl Send for OutRows<'_> {}
// SAFETY: through a shared reference only `part` writes, whose callers see to it that nobody else does so in the same place.
unsafe impl Sync for OutRows<'_> {}

impl<'a> OutRows<'a> {
    /// Rows of `n_cols` in `data`, one after the other.
    ///
    /// # Panics
    /// If `data` isn't whole rows.
    pub fn new(data: &'a mut [f32], n_cols: usize) -> Self {
        assert!(n_cols > 0 && data.len().is_multiple_of(n_cols));
        Self { data: data.as_mut_ptr(), n_rows: data.len() / n_cols, n_cols, stride: n_cols, lives: PhantomData }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// If they aren't there.
    pub fn columns(self, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= self.n_cols);
        Self { data: self.data.wrapping_add(columns.start), n_cols: columns.len(), ..self }
    }
}

/// A matrix times some tokens: element `r` of `out`'s row `i` becomes the dot product of row `r` of `w` with the activations of token
/// `tokens[i]` of `x`.
///
/// The result of an element depends on its row and its token alone: not on the groups, the other tokens, or the thread.
pub struct Product<'a> {
    /// The matrix.
    pub w: Packed<'a>,
    /// The groups of its rows that are multiplied.
    pub groups: Range<usize>,
    /// Activations, as wide as the matrix.
    pub x: &'a Acts,
    /// Tokens of them.
    pub tokens: &'a [u32],
    /// As many rows as tokens, or more, each as long as the matrix has rows, or longer.
    pub out: OutRows<'a>,
}

impl<'a> Product<'a> {
    /// Of all the matrix's rows.
    pub fn new(w: Packed<'a>, x: &'a Acts, tokens: &'a [u32], out: OutRows<'a>) -> Self {
        Self { w, groups: 0..w.n_groups(), x, tokens, out }
    }

    /// How much there is to do for a group of rows.
    fn group_work(&self) -> usize {
        let format = self.w.format();
        let n_bytes = self.w.n_rows * self.w.n_cols / format.block_len * format.block_bytes;
        n_bytes * self.tokens.len().max(1) / self.w.n_groups().max(1)
    }
}

/// Weight bytes that one item of a region should read at least: below this, handing out items costs more than an
/// uneven end; the figure is 2 to 4 microseconds of work at a core's bandwidth.
const ITEM_BYTES: usize = 32 << 10;
/// Items that a thread should get at least, so that all finish at nearly the same time.
const ITEMS_A_THREAD: usize = 8;

/// Multiplies, all of it as one parallel region: ranges of groups of about equal work are handed out to the threads.
///
/// # Panics
/// If a group, a token or a place in an `out` doesn't exist, or the widths differ.
pub fn matmul(team: &Team, products: &mut [Product<'_>]) {
    let products = &*products;
    let work: usize = products.iter().map(|p| p.group_work() * p.groups.len()).sum();
    let item = (work / (team.n_threads() * ITEMS_A_THREAD)).max(ITEM_BYTES);
    let mut items = Vec::new();
    for p in products {
        let step = (item / p.group_work().max(1)).max(1);
        items.extend(p.groups.clone().step_by(step).map(|g| (p, g..(g + step).min(p.groups.end))));
    }
    team.run(items.len(), &|i| {
        let (p, groups) = &items[i];
        // SAFETY: the products are borrowed here alone, each has places of its own, and items are different groups.
        unsafe { part(p, groups.clone()) };
    });
}

/// Multiplies on the calling thread.
///
/// # Panics
/// As [`matmul`] does.
pub fn matmul_here(product: &mut Product<'_>) {
    // SAFETY: the product is borrowed here alone.
    unsafe { part(product, product.groups.clone()) };
}

/// Some groups' part of a product.
///
/// # Safety
/// Nobody else reads or writes their elements of `out` meanwhile.
///
/// # Panics
/// As [`matmul`] does.
unsafe fn part(p: &Product<'_>, groups: Range<usize>) {
    let Product { w, x, tokens, out, .. } = p;
    assert!(groups.start <= groups.end && groups.end <= w.n_groups());
    assert!(tokens.len() <= out.n_rows && w.n_rows <= out.n_cols);
    assert_eq!(x.width(), w.n_cols);
    let mut done = 0;
    for tokens in tokens.chunks(MAX_TOKENS) {
        // SAFETY: the caller's promise.
        unsafe {
            if tokens.len() <= MAX_GEMV {
                run::<MAX_GEMV>(*w, &groups, x, tokens, out, done);
            } else {
                run::<MAX_TOKENS>(*w, &groups, x, tokens, out, done);
            }
        }
        done += tokens.len();
    }
}

/// How many bytes ahead of their use a single pass of `gemv` prefetches weights, if it does. Without that, four tokens at a time reach half
/// the bandwidth: the work between two loads is too long for the processor to look past.
const AHEAD: usize = 4096;

/// Up to `N` tokens, whose rows of `out` begin at `first`.
///
/// # Safety
/// As for [`part`], which has checked the rest.
unsafe fn run<const N: usize>(
    w: Packed<'_>,
    groups: &Range<usize>,
    x: &Acts,
    tokens: &[u32],
    out: &OutRows<'_>,
    first: usize,
) {
    let (kernels, format) = (w.kernels, w.format);
    let mut acts = [Act::NONE; N];
    for (act, token) in acts.iter_mut().zip(tokens) {
        *act = x.act(format.act, kernels.sub, *token as usize);
    }
    let full = w.n_rows / kernels.lanes;
    let packed = groups.start.min(full)..groups.end.min(full);
    // Few tokens are a few passes of `gemv`, a group at a time, so that the second finds the group in the cache, and all of them
    // together prefetch the next one.
    let (at_once, n_groups) = match tokens.len() {
        ..=MAX_GEMV => (tokens.len(), packed.len()),
        n if n <= kernels.few => (n.div_ceil(n.div_ceil(MAX_GEMV)), 1),
        n => (n, packed.len()),
    };
    let n_passes = tokens.len().div_ceil(at_once.max(1));
    let ahead = if n_passes > 1 { kernels.lanes * w.row_bytes } else { AHEAD };
    for first_group in packed.clone().step_by(n_groups.max(1)) {
        let row = first_group * kernels.lanes;
        for (i, acts) in acts[..tokens.len()].chunks(at_once).enumerate() {
            let kernel = if at_once <= MAX_GEMV { kernels.gemv[acts.len() - 1] } else { kernels.gemm };
            // SAFETY: `new` checked that the processor has the instructions and that the data holds the rows;
            // `part` that the groups and the places are there; `act` that the tokens are there and complete.
            // That nobody else writes the same places is the caller's promise.
            unsafe {
                kernel(&Job {
                    w: w.data[row * w.row_bytes..].as_ptr(),
                    n_groups,
                    n_blocks: w.n_cols / format.block_len,
                    x: acts,
                    out: out.data.add((first + i * at_once) * out.stride + row),
                    stride: out.stride,
                    ask: Ask { ahead, line: i, n_lines: n_passes },
                    lives: PhantomData,
                });
            }
        }
    }
    if groups.end > full {
        let rest = full * kernels.lanes..w.n_rows;
        let rows = &w.data[rest.start * w.row_bytes..rest.end * w.row_bytes];
        for (i, token) in tokens.iter().enumerate() {
            let x = x.row(format, *token as usize);
            // SAFETY: as above.
            let out = unsafe {
                std::slice::from_raw_parts_mut(out.data.add((first + i) * out.stride + rest.start), rest.len())
            };
            match format.act {
                ActKind::F32 => number::dot_rows(w.isa, format, rows, x.f32, out),
                _ => {
                    for (r, y) in out.iter_mut().enumerate() {
                        *y = (format.vec_dot)(&rows[r * w.row_bytes..][..w.row_bytes], x);
                    }
                }
            }
        }
    }
}
