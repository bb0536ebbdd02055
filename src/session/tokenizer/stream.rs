//! From tokens to text, one token at a time.

use super::Tokenizer;

/// Turns tokens into text as they come, and never splits a character: bytes that may become one with the next
/// token are held back. What can't become a character any more is written as U+FFFD, exactly as if the whole had been decoded at once.
#[derive(Clone, Debug, Default)]
pub struct StreamDecoder {
    held: Vec<u8>,
    text: String,
    strip_space: bool,
    show_special: bool,
}

impl StreamDecoder {
    /// A decoder for text that continues other text. With `show_special`, control tokens are written out too.
    pub fn new(show_special: bool) -> StreamDecoder {
        StreamDecoder { show_special, ..StreamDecoder::default() }
    }

    /// A decoder for text that begins here: the space that the tokeniser puts before a text is taken away again.
    pub(super) fn from_start(tokenizer: &Tokenizer, show_special: bool) -> StreamDecoder {
        StreamDecoder { strip_space: tokenizer.adds_space_prefix(), ..StreamDecoder::new(show_special) }
    }

    /// Takes a token; the answer is the text that is certain now and wasn't before, which may be none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> &str {
        self.text.clear();
        if self.show_special || !tokenizer.is_hidden(id) {
            let piece = tokenizer.token_bytes(id);
            let strip = std::mem::take(&mut self.strip_space);
            self.held.extend_from_slice(piece.strip_prefix(b" ").filter(|_| strip).unwrap_or(&piece));
        }
        self.release();
        &self.text
    }

    /// Ends the text: a character that stayed incomplete becomes U+FFFD.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        self.text.push_str(&String::from_utf8_lossy(&self.held));
        self.held.clear();
        &self.text
    }

    /// Moves what is certain from the held bytes to the text.
    fn release(&mut self) {
        let mut done = 0;
        loop {
            match std::str::from_utf8(&self.held[done..]) {
                Ok(valid) => {
                    self.text.push_str(valid);
                    done = self.held.len();
                    break;
                }
                Err(e) => {
                    let valid = done + e.valid_up_to();
                    self.text.push_str(&String::from_utf8_lossy(&self.held[done..valid]));
                    done = valid;
                    // Without a length the bytes are the beginning of a character.
                    let Some(bad) = e.error_len() else { break };
                    self.text.push(char::REPLACEMENT_CHARACTER);
                    done += bad;
                }
            }
        }
        self.held.drain(..done);
    }
}
