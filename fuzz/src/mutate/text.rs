//! Changes of texts by the tokens of their language.

use crate::random::Random;

/// A few changes: `words` put in or in the place of something, pieces cut, doubled and moved, and now and then
/// bytes as such.
pub fn change(random: &mut Random, text: &mut Vec<u8>, words: &[&str]) {
    for _ in 0..random.few() {
        let range = word(random, text);
        match random.below(9) {
            0 | 1 if !words.is_empty() => {
                let new = random.pick(words).bytes();
                text.splice(range.start..range.start, new);
            }
            2 | 3 if !words.is_empty() => {
                let new = random.pick(words).bytes();
                text.splice(range, new);
            }
            4 => {
                text.drain(range);
            }
            5 => {
                let piece = text[range.clone()].to_vec();
                text.splice(range.end..range.end, piece);
            }
            6 => {
                let piece = text[range].to_vec();
                let at = random.below(text.len() + 1);
                text.splice(at..at, piece);
            }
            7 => {
                let piece = random.range(text.len());
                text.drain(piece);
            }
            _ => super::bytes(random, text),
        }
    }
}

/// A piece of one kind of letters somewhere in the text.
fn word(random: &mut Random, text: &[u8]) -> std::ops::Range<usize> {
    let at = random.below(text.len());
    let kind = |byte: &u8| {
        (
            byte.is_ascii_alphanumeric() || *byte == b'_',
            byte.is_ascii_whitespace(),
        )
    };
    let Some(first) = text.get(at).map(kind) else {
        return 0..0;
    };
    let same = |byte: &&u8| kind(byte) == first;
    let before = text[..at].iter().rev().take(64).take_while(same).count();
    let after = text[at..].iter().take(64).take_while(same).count();
    at - before..at + after
}
