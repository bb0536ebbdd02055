//! Stop strings in a stream: what may be printed, what must wait, and when to end.
//!
//! The text arrives in pieces, and a stop string may begin in one and end in another. Everything that could still become a stop string is
//! held back; the rest goes out at once. How the text was cut into pieces changes nothing.

/// Watches streamed text for stop strings. Each byte costs a constant time for each stop string, whatever the text (Knuth, Morris and Pratt 1977).
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Text that may turn out to begin a stop string.
    held: String,
    stopped: bool,
}

#[derive(Clone, Debug)]
struct Stop {
    text: String,
    /// For each length of a matched prefix, the length of its longest proper prefix that is also its suffix.
    fallback: Vec<usize>,
    /// So many bytes of `text` are matched by the end of what was seen.
    matched: usize,
}

/// What a piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Print this. It never contains a stop string or the beginning of the one that was found.
    pub text: String,
    /// The stop string that ended the text: end the generation.
    pub stop: Option<String>,
}

/// A stop string that can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("stop string {index} is empty and would end every answer before it began; leave it out")]
pub struct EmptyStop {
    /// Its place in the list, from 0.
    pub index: usize,
}

impl StopMatcher {
    /// A matcher that has seen nothing yet.
    ///
    /// # Errors
    /// A stop string is empty.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Result<Self, EmptyStop> {
        let stops = stops.into_iter().map(Into::into).enumerate();
        let stops =
            stops.map(|(index, text)| if text.is_empty() { Err(EmptyStop { index }) } else { Ok(Stop::new(text)) });
        Ok(Self { stops: stops.collect::<Result<_, _>>()?, held: String::new(), stopped: false })
    }

    /// Takes the next piece of text.
    ///
    /// The stop string that is complete first wins; of several that end together, the longest. After a stop nothing is printed any more.
    pub fn push(&mut self, piece: &str) -> StopOutput {
        if self.stopped {
            return StopOutput::default();
        }
        for (i, &byte) in piece.as_bytes().iter().enumerate() {
            let mut found: Option<&Stop> = None;
            for stop in &mut self.stops {
                let complete = stop.step(byte);
                if complete && found.is_none_or(|f| f.text.len() < stop.text.len()) {
                    found = Some(stop);
                }
            }
            if let Some(stop) = found {
                let stop = stop.text.clone();
                self.stopped = true;
                let mut text = std::mem::take(&mut self.held);
                // A stop string ends with a whole character, so this is a boundary, and so is where it began.
                text.push_str(&piece[..=i]);
                text.truncate(text.len() - stop.len());
                return StopOutput { text, stop: Some(stop) };
            }
        }
        self.held.push_str(piece);
        // The longest prefix of any stop string that the text ends with. It begins with a whole character, so it's cut at a boundary.
        let wait = self.stops.iter().map(|s| s.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - wait);
        StopOutput { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text is over: what was held back didn't become a stop string.
    pub fn finish(&mut self) -> String {
        self.stops.iter_mut().for_each(|s| s.matched = 0);
        self.stopped = true;
        std::mem::take(&mut self.held)
    }
}

impl Stop {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut k = 0;
        for i in 1..bytes.len() {
            while k > 0 && bytes[i] != bytes[k] {
                k = fallback[k];
            }
            k += usize::from(bytes[i] == bytes[k]);
            fallback[i + 1] = k;
        }
        Self { text, fallback, matched: 0 }
    }

    /// Whether the stop string is complete with this byte.
    fn step(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        if self.matched < bytes.len() {
            return false;
        }
        self.matched = self.fallback[self.matched];
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The whole text at once: what is printed, what stopped it.
    fn naive(text: &str, stops: &[String]) -> (String, Option<String>) {
        for end in 1..=text.len() {
            let ending = stops.iter().filter(|s| text.as_bytes()[..end].ends_with(s.as_bytes()));
            if let Some(stop) = ending.max_by_key(|s| s.len()) {
                return (text[..end - stop.len()].to_string(), Some(stop.clone()));
            }
        }
        (text.to_string(), None)
    }

    fn streamed(pieces: &[&str], stops: &[String]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.to_vec()).unwrap();
        let mut all = String::new();
        for (i, piece) in pieces.iter().enumerate() {
            let out = matcher.push(piece);
            all += &out.text;
            if out.stop.is_some() {
                assert_eq!(matcher.push("more"), StopOutput::default());
                assert_eq!(matcher.finish(), "");
                return (all, out.stop);
            }
            // Nothing waits that couldn't begin a stop string.
            let seen = pieces[..=i].concat();
            let wait = seen.len() - all.len();
            assert!(
                wait == 0 || stops.iter().any(|s| s.starts_with(&seen[seen.len() - wait..])),
                "{wait} held of {seen:?}"
            );
        }
        (all + &matcher.finish(), None)
    }

    /// Two cuts anywhere, and every character by itself.
    fn splits(text: &str) -> Vec<Vec<&str>> {
        let cuts: Vec<usize> = text.char_indices().map(|x| x.0).chain([text.len()]).collect();
        let mut all = vec![cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect()];
        for (i, &a) in cuts.iter().enumerate() {
            all.extend(cuts[i..].iter().map(|&b| vec![&text[..a], &text[a..b], &text[b..]]));
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn every_split_agrees_with_the_whole(text in "[abé€]{0,24}", stops in prop::collection::vec("[abé€]{1,5}", 0..4)) {
            let want = naive(&text, &stops);
            for pieces in splits(&text) {
                prop_assert_eq!(streamed(&pieces, &stops), want.clone(), "{:?}", pieces);
            }
        }
    }

    #[test]
    fn the_stop_that_is_complete_first_wins() {
        let stops = ["abcd".to_string(), "bc".to_string()];
        assert_eq!(streamed(&["xab", "cd"], &stops), ("xa".into(), Some("bc".into())));
        let stops = ["b".to_string(), "ab".to_string()];
        assert_eq!(streamed(&["xab"], &stops), ("x".into(), Some("ab".into())));
    }

    #[test]
    fn text_waits_only_as_long_as_it_must() {
        let mut m = StopMatcher::new(["\nUser:"]).unwrap();
        assert_eq!(m.push("Hello\n").text, "Hello");
        assert_eq!(m.push("Us").text, "");
        assert_eq!(m.push("ed").text, "\nUsed");
        assert_eq!(m.push("\n\nUser").text, "\n");
        assert_eq!(m.finish(), "\nUser");
    }

    #[test]
    fn characters_of_several_bytes_stay_whole() {
        // é is c3 a9, è is c3 a8: they share their first byte.
        let mut m = StopMatcher::new(["é!"]).unwrap();
        assert_eq!(m.push("caf").text, "caf");
        assert_eq!(m.push("è").text, "è");
        assert_eq!(m.push("é").text, "");
        assert_eq!(m.push("!"), StopOutput { text: String::new(), stop: Some("é!".into()) });
    }

    #[test]
    fn nothing_to_stop_at_and_nothing_at_all() {
        let mut m = StopMatcher::new(Vec::<String>::new()).unwrap();
        assert_eq!(m.push("text").text, "text");
        assert_eq!(m.finish(), "");
        let error = StopMatcher::new(["a", ""]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "stop string 1 is empty and would end every answer before it began; leave it out"
        );
    }

    /// A text that makes naive matchers quadratic.
    #[test]
    fn long_repetitive_stops_are_linear() {
        let mut m = StopMatcher::new(["a".repeat(100_000) + "b"]).unwrap();
        let mut out = 0;
        for _ in 0..1000 {
            out += m.push(&"a".repeat(1000)).text.len();
        }
        assert_eq!(out, 900_000);
        assert!(m.push("b").stop.is_some());
    }
}
