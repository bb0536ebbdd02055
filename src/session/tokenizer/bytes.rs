//! GPT-2's alphabet: each byte written as one printable character, so that a vocabulary file is text.
//!
//! Radford et al. 2019, “Language Models are Unsupervised Multitask Learners”, `bytes_to_unicode` of its published encoder.

/// Whether the byte stands for itself: the printable ones of Latin-1.
const fn is_plain(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The byte of each character below U+0144; `NO_BYTE` for those that aren't in the alphabet.
static BYTE_OF: [u16; 0x144] = byte_table();
const NO_BYTE: u16 = 256;

const fn byte_table() -> [u16; 0x144] {
    let mut table = [NO_BYTE; 0x144];
    let mut moved = 0x100; // the others follow each other from U+0100 on
    let mut byte = 0;
    while byte < 256 {
        if is_plain(byte as u8) {
            table[byte] = byte as u16;
        } else {
            table[moved] = byte as u16;
            moved += 1;
        }
        byte += 1;
    }
    table
}

/// Appends the bytes that `text` stands for. False, with `out` as it was, if a character isn't in the alphabet.
pub(super) fn decode_into(text: &str, out: &mut Vec<u8>) -> bool {
    let before = out.len();
    for c in text.chars() {
        match BYTE_OF.get(c as usize) {
            Some(&byte) if byte != NO_BYTE => out.push(byte as u8),
            _ => {
                out.truncate(before);
                return false;
            }
        }
    }
    true
}

/// Whether the byte is written as itself in ASCII.
pub(super) fn is_plain_ascii(byte: u8) -> bool {
    byte.is_ascii() && is_plain(byte)
}

/// The text that stands for these bytes.
#[cfg(test)]
pub(super) fn encode(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|&b| {
            let code = BYTE_OF.iter().position(|&x| x == u16::from(b)).unwrap();
            char::from_u32(code as u32).unwrap()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let all: Vec<u8> = (0..=255).collect();
        let text = encode(&all);
        assert_eq!(text.chars().count(), 256);
        let mut back = Vec::new();
        assert!(decode_into(&text, &mut back));
        assert_eq!(back, all);
        assert_eq!(encode(b" a\n"), "ĠaĊ");
    }

    #[test]
    fn other_characters_are_refused_whole() {
        let mut out = vec![7];
        for bad in ["a b", "a\u{ad}", "a\n", "a\u{144}", "a字"] {
            assert!(!decode_into(bad, &mut out), "{bad:?}");
            assert_eq!(out, [7]);
        }
    }
}
