//! One timeline: text in, tokens, sampling, text out.
