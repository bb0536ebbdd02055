//! llama.cpp as the reference, behind a safe face: tests and benches read logits, tokens and texts from it.
//!
//! Included with `#[path]` by every test that compares. It stands on the raw bindings because the safe
//! crate hides `use_extra_bufts`, the switch between llama.cpp's plain and repacked modes.
//! A failure of the reference is a failure of the test, so everything here panics with what went wrong.
#![allow(unsafe_code)]
#![allow(dead_code)] // each test uses its part

use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Once;

use llama_cpp_sys_2 as sys;
use oncall::cpu::Isa;

/// How llama.cpp holds the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As they are in the file.
    Plain,
    /// Rearranged at load where it has a faster kernel for that; aborts the process on `deepseek2`.
    Repacked,
}

/// The type of the keys and values in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kv {
    F32,
    F16,
    Q8_0,
}

/// What a context is made with. The default is the most exact that llama.cpp offers.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub n_ctx: u32,
    /// Tokens of one call and of one graph.
    pub n_batch: u32,
    pub n_threads: i32,
    pub kv: Kv,
    /// A quantised cache needs it.
    pub flash_attn: bool,
    /// Timelines that decode together; they share `n_ctx` positions.
    pub n_seq: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { n_ctx: 1024, n_batch: 512, n_threads: 2, kv: Kv::F32, flash_attn: false, n_seq: 1 }
    }
}

/// A loaded model.
#[derive(Clone)]
pub struct Model {
    model: Rc<ModelPtr>,
    vocab: NonNull<sys::llama_vocab>,
}

struct ModelPtr(NonNull<sys::llama_model>);

impl Drop for ModelPtr {
    fn drop(&mut self) {
        // SAFETY: the only owner frees it once; contexts hold an Rc and are gone.
        unsafe { sys::llama_model_free(self.0.as_ptr()) }
    }
}

unsafe extern "C" fn no_log(_: sys::ggml_log_level, _: *const c_char, _: *mut std::os::raw::c_void) {}

/// Starts the backend once in a process, silent unless `LLAMA_LOG` is set.
pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        // SAFETY: called once, before anything else of the library; the callback is a plain function.
        unsafe {
            if std::env::var_os("LLAMA_LOG").is_none() {
                sys::llama_log_set(Some(no_log), std::ptr::null_mut());
            }
            sys::llama_backend_init();
        }
    });
}

/// The instruction sets that ggml was compiled for, by its own names.
pub fn instruction_sets() -> Vec<String> {
    // SAFETY: the library returns a string of its own that ends in NUL.
    let info = unsafe { CStr::from_ptr(sys::llama_print_system_info()) }.to_string_lossy();
    let on = |part: &str| Some(part.rsplit(" : ").next()?.split_once(" = 1")?.0.trim().to_owned());
    info.split('|').filter_map(on).collect()
}

/// Panics if ggml was compiled for less than `isa`: what is compared with it then says nothing.
pub fn require(isa: Isa) {
    let needed: &[&str] = match isa {
        Isa::Scalar => &[],
        Isa::Avx2 => &["AVX2", "FMA", "F16C"],
        Isa::AvxVnni => &["AVX_VNNI"],
        Isa::Avx512Vnni => &["AVX512", "AVX512_VNNI"],
        Isa::Avx512Amx => &["AVX512_VNNI", "AMX_INT8"],
        Isa::Neon => &["NEON"],
        Isa::NeonDot => &["DOTPROD"],
        Isa::NeonI8mm => &["MATMUL_INT8"],
    };
    let has = instruction_sets();
    let lacks: Vec<&str> = needed.iter().copied().filter(|n| !has.iter().any(|h| h == n)).collect();
    assert!(
        lacks.is_empty(),
        "llama.cpp was built without {}, and {isa} would be compared with less than it can do: run \
        `cargo clean --release -p llama-cpp-sys-2`, then `benches/native` and this command, which builds it for this processor",
        lacks.join(", ")
    );
}

fn len_i32(len: usize) -> i32 {
    i32::try_from(len).expect("a test's input fits i32")
}

impl Model {
    /// Loads a file; panics if llama.cpp refuses it (run with `LLAMA_LOG=1` to see why).
    pub fn load(path: impl AsRef<Path>, mode: Mode) -> Self {
        Self::load_with(path.as_ref(), |params| params.use_extra_bufts = mode == Mode::Repacked)
    }

    /// Loads nothing but a file's vocabulary; it needs no weights.
    pub fn load_vocab(path: impl AsRef<Path>) -> Self {
        Self::load_with(path.as_ref(), |params| params.vocab_only = true)
    }

    fn load_with(path: &Path, set: impl FnOnce(&mut sys::llama_model_params)) -> Self {
        init();
        let c_path = CString::new(path.to_str().expect("UTF-8 path")).expect("no NUL in the path");
        // SAFETY: the parameters are the library's own defaults; the path outlives the call.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            set(&mut params);
            sys::llama_model_load_from_file(c_path.as_ptr(), params)
        };
        let model = NonNull::new(model)
            .unwrap_or_else(|| panic!("llama.cpp refuses {} (LLAMA_LOG=1 says why)", path.display()));
        // SAFETY: the model is alive; its vocabulary lives as long as it does.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        Self {
            model: Rc::new(ModelPtr(model)),
            vocab: NonNull::new(vocab.cast_mut()).expect("a model has a vocabulary"),
        }
    }

    pub fn n_vocab(&self) -> usize {
        // SAFETY: the vocabulary lives as long as the model that self holds.
        unsafe { sys::llama_vocab_n_tokens(self.vocab.as_ptr()) as usize }
    }

    pub fn is_eog(&self, token: u32) -> bool {
        // SAFETY: as in n_vocab; the library checks the token's range.
        unsafe { sys::llama_vocab_is_eog(self.vocab.as_ptr(), token as i32) }
    }

    /// The token ids of a text; `parse_special` lets the text spell special tokens.
    pub fn tokenize(&self, text: &[u8], add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut out = vec![0i32; text.len() + 8];
        loop {
            // SAFETY: both buffers are valid for the lengths passed with them.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab.as_ptr(),
                    text.as_ptr().cast(),
                    len_i32(text.len()),
                    out.as_mut_ptr(),
                    len_i32(out.len()),
                    add_special,
                    parse_special,
                )
            };
            if n >= 0 {
                out.truncate(n as usize);
                return out.iter().map(|&t| t as u32).collect();
            }
            out.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// The bytes of these tokens as llama.cpp joins them.
    pub fn detokenize(&self, tokens: &[u32], remove_special: bool, unparse_special: bool) -> Vec<u8> {
        let ids: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        let mut out = vec![0u8; tokens.len() * 8 + 16];
        loop {
            // SAFETY: both buffers are valid for the lengths passed with them.
            let n = unsafe {
                sys::llama_detokenize(
                    self.vocab.as_ptr(),
                    ids.as_ptr(),
                    len_i32(ids.len()),
                    out.as_mut_ptr().cast(),
                    len_i32(out.len()),
                    remove_special,
                    unparse_special,
                )
            };
            if n >= 0 {
                out.truncate(n as usize);
                return out;
            }
            out.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// The bytes of one token alone.
    pub fn token_to_piece(&self, token: u32, special: bool) -> Vec<u8> {
        let mut out = vec![0u8; 64];
        loop {
            // SAFETY: the buffer is valid for the length passed with it.
            let n = unsafe {
                sys::llama_token_to_piece(
                    self.vocab.as_ptr(),
                    token as i32,
                    out.as_mut_ptr().cast(),
                    len_i32(out.len()),
                    0,
                    special,
                )
            };
            if n >= 0 {
                out.truncate(n as usize);
                return out;
            }
            out.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// The file's own chat template.
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: a NULL name asks for the default; the text lives as long as the model.
        unsafe {
            let text = sys::llama_model_chat_template(self.model.0.as_ptr(), std::ptr::null());
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    }

    /// Renders (role, content) messages with one of llama.cpp's built-in templates: it recognises the known ones by
    /// their text and panics on others, it doesn't run Jinja here.
    pub fn apply_chat_template(template: &str, messages: &[(&str, &str)], add_generation_prompt: bool) -> String {
        let texts: Vec<(CString, CString)> = messages
            .iter()
            .map(|(role, content)| (CString::new(*role).expect("no NUL"), CString::new(*content).expect("no NUL")))
            .collect();
        let chat: Vec<sys::llama_chat_message> = texts
            .iter()
            .map(|(role, content)| sys::llama_chat_message { role: role.as_ptr(), content: content.as_ptr() })
            .collect();
        let template = CString::new(template).expect("no NUL");
        let mut out = vec![0u8; 1024];
        loop {
            // SAFETY: the texts outlive the call; the buffer is valid for the length passed with it.
            let n = unsafe {
                sys::llama_chat_apply_template(
                    template.as_ptr(),
                    chat.as_ptr(),
                    chat.len(),
                    add_generation_prompt,
                    out.as_mut_ptr().cast(),
                    len_i32(out.len()),
                )
            };
            let n = usize::try_from(n).expect("llama.cpp doesn't know this template");
            if n <= out.len() {
                out.truncate(n);
                return String::from_utf8(out).expect("a rendered template is UTF-8");
            }
            out.resize(n, 0);
        }
    }

    /// A new, empty timeline.
    pub fn context(&self, options: Options) -> Context {
        let kv = match options.kv {
            Kv::F32 => sys::GGML_TYPE_F32,
            Kv::F16 => sys::GGML_TYPE_F16,
            Kv::Q8_0 => sys::GGML_TYPE_Q8_0,
        };
        // SAFETY: the parameters are the library's defaults with plain numbers changed; the model is alive.
        let context = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = options.n_ctx;
            params.n_batch = options.n_batch;
            params.n_ubatch = options.n_batch;
            params.n_seq_max = options.n_seq;
            params.n_threads = options.n_threads;
            params.n_threads_batch = options.n_threads;
            params.type_k = kv;
            params.type_v = kv;
            params.flash_attn_type = if options.flash_attn {
                sys::LLAMA_FLASH_ATTN_TYPE_ENABLED
            } else {
                sys::LLAMA_FLASH_ATTN_TYPE_DISABLED
            };
            params.no_perf = true;
            sys::llama_init_from_model(self.model.0.as_ptr(), params)
        };
        Context {
            context: NonNull::new(context).expect("llama.cpp makes a context of these options (LLAMA_LOG=1 says why)"),
            n_batch: options.n_batch as usize,
            n_past: 0,
            model: self.clone(),
        }
    }
}

/// One timeline of a model.
pub struct Context {
    context: NonNull<sys::llama_context>,
    n_batch: usize,
    n_past: usize,
    model: Model,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the only owner frees it once, before the model that it holds.
        unsafe { sys::llama_free(self.context.as_ptr()) }
    }
}

impl Context {
    /// Forgets everything.
    pub fn clear(&mut self) {
        // SAFETY: the context is alive.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context.as_ptr()), true) }
        self.n_past = 0;
    }

    /// Forgets all but the first tokens.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.n_past);
        // SAFETY: the context is alive; the positions of sequence 0 from `len` on are there or absent.
        let done =
            unsafe { sys::llama_memory_seq_rm(sys::llama_get_memory(self.context.as_ptr()), 0, len_i32(len), -1) };
        assert!(done, "llama.cpp can't forget a part");
        self.n_past = len;
    }

    /// Tokens seen so far.
    pub fn n_past(&self) -> usize {
        self.n_past
    }

    /// Appends the tokens in chunks of `n_batch`; logits after each of them, (n_tokens, n_vocab).
    pub fn logits_all(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(tokens.len() * self.model.n_vocab());
        for chunk in tokens.chunks(self.n_batch) {
            self.decode_chunk(chunk, true, &mut out);
        }
        out
    }

    /// Appends the tokens in chunks of `n_batch`; the logits after the last one, (n_vocab).
    pub fn decode(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut out = Vec::new();
        for chunk in tokens.chunks(self.n_batch) {
            out.clear();
            self.decode_chunk(chunk, false, &mut out);
        }
        out
    }

    /// Appends the prompt and up to `n` most likely tokens, without the end-of-generation token that may stop it.
    pub fn greedy(&mut self, prompt: &[u32], n: usize) -> Vec<u32> {
        let mut logits = self.decode(prompt);
        let mut out = Vec::new();
        while out.len() < n {
            let token = super::stats::argmax(&logits) as u32;
            if self.model.is_eog(token) {
                break;
            }
            out.push(token);
            if out.len() < n {
                logits = self.decode(&[token]);
            }
        }
        out
    }

    /// One pass over a token of each timeline at the same position; the best next token of each.
    pub fn decode_together(&mut self, tokens: &[u32], pos: usize) -> Vec<u32> {
        // SAFETY: llama_batch_init allocates every array for tokens.len() tokens of one timeline each, and the loop fills
        // exactly these; the logits hold a row for each token until the next decode.
        let logits = unsafe {
            let mut batch = sys::llama_batch_init(len_i32(tokens.len()), 0, 1);
            for (i, &token) in tokens.iter().enumerate() {
                *batch.token.add(i) = token as i32;
                *batch.pos.add(i) = len_i32(pos);
                *batch.n_seq_id.add(i) = 1;
                **batch.seq_id.add(i) = len_i32(i);
                *batch.logits.add(i) = 1;
            }
            batch.n_tokens = len_i32(tokens.len());
            let status = sys::llama_decode(self.context.as_ptr(), batch);
            sys::llama_batch_free(batch);
            assert_eq!(status, 0, "llama_decode failed at position {pos}");
            let logits = sys::llama_get_logits(self.context.as_ptr());
            assert!(!logits.is_null(), "llama.cpp gave no logits");
            std::slice::from_raw_parts(logits, tokens.len() * self.model.n_vocab())
        };
        logits.chunks(self.model.n_vocab()).map(|l| super::stats::argmax(l) as u32).collect()
    }

    fn decode_chunk(&mut self, chunk: &[u32], all: bool, out: &mut Vec<f32>) {
        let n_outputs = if all { chunk.len() } else { 1 };
        // SAFETY: llama_batch_init allocates every array for chunk.len() tokens of one sequence, and the loop fills
        // exactly these; the logits hold a row for each flagged token until the next decode.
        unsafe {
            let mut batch = sys::llama_batch_init(len_i32(chunk.len()), 0, 1);
            for (i, &token) in chunk.iter().enumerate() {
                *batch.token.add(i) = token as i32;
                *batch.pos.add(i) = len_i32(self.n_past + i);
                *batch.n_seq_id.add(i) = 1;
                **batch.seq_id.add(i) = 0;
                *batch.logits.add(i) = i8::from(all || i + 1 == chunk.len());
            }
            batch.n_tokens = len_i32(chunk.len());
            let status = sys::llama_decode(self.context.as_ptr(), batch);
            sys::llama_batch_free(batch);
            assert_eq!(status, 0, "llama_decode failed at position {}", self.n_past);
            let logits = sys::llama_get_logits(self.context.as_ptr());
            assert!(!logits.is_null(), "llama.cpp gave no logits");
            out.extend_from_slice(std::slice::from_raw_parts(logits, n_outputs * self.model.n_vocab()));
        }
        self.n_past += chunk.len();
    }
}

/// One of llama.cpp's samplers with its parameters.
#[derive(Clone, Copy, Debug)]
pub enum Link<'a> {
    /// For a vocabulary of this many tokens: what is added to the logits of some.
    LogitBias(usize, &'a [(u32, f32)]),
    Penalties {
        n_vocab: usize,
        last_n: i32,
        repeat: f32,
        frequency: f32,
        presence: f32,
    },
    TopK(i32),
    Typical(f32),
    TopP(f32),
    MinP(f32),
    Temp(f32),
}

impl Link<'_> {
    /// The sampler; whoever gets it frees it.
    fn init(self) -> *mut sys::llama_sampler {
        // SAFETY: plain numbers, and an array that is copied within the call and valid for the length passed with it.
        unsafe {
            match self {
                Link::LogitBias(n_vocab, biases) => {
                    let biases: Vec<_> =
                        biases.iter().map(|&(id, bias)| sys::llama_logit_bias { token: id as i32, bias }).collect();
                    sys::llama_sampler_init_logit_bias(len_i32(n_vocab), len_i32(biases.len()), biases.as_ptr())
                }
                Link::Penalties { n_vocab, last_n, repeat, frequency, presence } => {
                    sys::llama_sampler_init_penalties(len_i32(n_vocab), last_n, repeat, frequency, presence)
                }
                Link::TopK(k) => sys::llama_sampler_init_top_k(k),
                Link::Typical(p) => sys::llama_sampler_init_typical(p, 1),
                Link::TopP(p) => sys::llama_sampler_init_top_p(p, 1),
                Link::MinP(p) => sys::llama_sampler_init_min_p(p, 1),
                Link::Temp(t) => sys::llama_sampler_init_temp(t),
            }
        }
    }
}

/// Samplers one after the other, without a draw at the end.
pub struct Chain(NonNull<sys::llama_sampler>);

impl Drop for Chain {
    fn drop(&mut self) {
        // SAFETY: the only owner frees it once, and with it its links.
        unsafe { sys::llama_sampler_free(self.0.as_ptr()) }
    }
}

impl Chain {
    pub fn new(links: &[Link<'_>]) -> Self {
        init();
        // SAFETY: the chain owns its links from when they are added.
        unsafe {
            let chain = sys::llama_sampler_chain_init(sys::llama_sampler_chain_default_params());
            for link in links {
                sys::llama_sampler_chain_add(chain, link.init());
            }
            Self(NonNull::new(chain).expect("llama.cpp makes a chain"))
        }
    }

    /// Tells the chain what was said.
    pub fn accept(&mut self, token: u32) {
        // SAFETY: the chain is alive.
        unsafe { sys::llama_sampler_accept(self.0.as_ptr(), token as i32) }
    }

    /// The tokens that are left and their logits, which the temperature has divided.
    pub fn apply(&mut self, logits: &[f32]) -> Vec<(u32, f32)> {
        let candidate = |(id, &logit): (usize, &f32)| sys::llama_token_data { id: len_i32(id), logit, p: 0.0 };
        let mut data: Vec<_> = logits.iter().enumerate().map(candidate).collect();
        let mut array =
            sys::llama_token_data_array { data: data.as_mut_ptr(), size: data.len(), selected: -1, sorted: false };
        // SAFETY: the array describes `data`, which outlives the call; samplers only shorten and reorder it.
        unsafe { sys::llama_sampler_apply(self.0.as_ptr(), &mut array) }
        assert!(array.data == data.as_mut_ptr() && array.size <= data.len(), "a sampler moved its candidates");
        data[..array.size].iter().map(|d| (d.id as u32, d.logit)).collect()
    }
}

/// ggml's reference quantiser of a format, by its number in a file: rows of `n_per_row` weights to bytes.
pub fn quantize(ggml_type: u32, src: &[f32], n_per_row: usize) -> Vec<u8> {
    init();
    assert!(n_per_row > 0 && src.len().is_multiple_of(n_per_row));
    let n_rows = src.len() / n_per_row;
    // SAFETY: a row's size is ggml's own; the output has room for all rows, the input holds them.
    unsafe {
        let mut out = vec![0u8; n_rows * sys::ggml_row_size(ggml_type, n_per_row as i64)];
        let n = sys::ggml_quantize_chunk(
            ggml_type,
            src.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            n_rows as i64,
            n_per_row as i64,
            std::ptr::null(),
        );
        assert_eq!(n, out.len(), "ggml quantised another number of bytes");
        out
    }
}

/// ggml's dequantiser of a format, by its number in a file: `n` weights of whole blocks.
pub fn dequantize(ggml_type: u32, src: &[u8], n: usize) -> Vec<f32> {
    init();
    let mut out = vec![0f32; n];
    // SAFETY: the traits live for ever; the input holds the bytes of n weights, the output n floats.
    unsafe {
        assert_eq!(src.len(), sys::ggml_row_size(ggml_type, n as i64), "bytes of {n} weights");
        let traits = &*sys::ggml_get_type_traits(ggml_type);
        let to_float = traits.to_float.expect("the format has a dequantiser");
        to_float(src.as_ptr().cast(), out.as_mut_ptr(), n as i64);
    }
    out
}
