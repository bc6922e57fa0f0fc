//! Words for people: quoting text we did not write, and guessing what a misspelt word was meant to be.
//!
//! Errors name the thing, the value and what would be right. The value may come from a datastore that is not
//! trusted, so it is escaped and cut before it reaches a log.

/// Characters of foreign text that are shown.
const SHOWN: usize = 64;

/// Words longer than this have no nearest word: nobody mistypes that much, and the comparison stays cheap.
const LONGEST_WORD: usize = 48;

/// `text` in double quotes, control characters escaped, cut after 64 characters.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", shown(text))
}

/// `text` without quotes around it, control characters escaped, cut after 64 characters.
pub fn shown(text: &str) -> String {
    let mut chars = text.chars();
    let mut out: String = chars.by_ref().take(SHOWN).flat_map(char::escape_debug).collect();
    if chars.next().is_some() {
        out.push('…');
    }
    out
}

/// The candidate that differs least from `word`, case ignored, if it is near enough to be what was meant: a third
/// of the word's letters may be wrong, one is always forgiven.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word: Vec<char> = word.chars().take(LONGEST_WORD + 1).flat_map(char::to_lowercase).collect();
    if word.is_empty() || word.len() > LONGEST_WORD {
        return None;
    }
    let forgiven = (word.len() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| {
            let letters: Vec<char> = candidate.chars().flat_map(char::to_lowercase).collect();
            (distance(&word, &letters), candidate)
        })
        .filter(|(distance, _)| *distance <= forgiven)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Letters to insert, delete, replace or swap with their neighbour to turn one word into the other (optimal string
/// alignment).
fn distance(from: &[char], to: &[char]) -> usize {
    // `rows[i][j]` is the distance between the first i letters of `from` and the first j of `to`.
    let mut rows: Vec<Vec<usize>> = vec![(0..=to.len()).collect()];
    for (i, letter) in from.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, other) in to.iter().enumerate() {
            let at = |row: usize, column: usize| {
                rows.get(row).and_then(|row| row.get(column)).copied().unwrap_or(usize::MAX - 1)
            };
            let left = row.last().copied().unwrap_or(i + 1);
            let mut least = (at(i, j) + usize::from(letter != other)).min(at(i, j + 1) + 1).min(left + 1);
            let swapped = i > 0 && j > 0 && from.get(i - 1) == Some(other) && to.get(j - 1) == Some(letter);
            if swapped {
                least = least.min(at(i - 1, j - 1) + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows.last().and_then(|row| row.last()).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_inserted_deleted_replaced_and_swapped_letters() {
        for (from, to, wanted) in [
            ("", "", 0),
            ("a", "", 1),
            ("", "ab", 2),
            ("kitten", "sitting", 3),
            ("flaw", "lawn", 2),
            ("prot", "port", 1),
            ("ab", "ba", 1),
        ] {
            let letters = |text: &str| text.chars().collect::<Vec<_>>();
            assert_eq!(distance(&letters(from), &letters(to)), wanted, "{from} {to}");
            assert_eq!(distance(&letters(to), &letters(from)), wanted, "{to} {from}");
        }
    }

    #[test]
    fn the_nearest_word_is_offered_only_when_it_is_near() {
        let known = ["Network", "SubnetLen", "SubnetMin", "Backend"];
        for (word, wanted) in [
            ("Netwrok", Some("Network")),
            ("subnet_len", Some("SubnetLen")),
            ("SUBNETMINN", Some("SubnetMin")),
            ("backends", Some("Backend")),
            ("Vegetables", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), wanted, "{word}");
        }
        assert_eq!(nearest(&"x".repeat(100_000), known), None);
    }

    #[test]
    fn foreign_text_is_escaped_and_cut() {
        assert_eq!(quoted("a\n\u{1b}[31m\"b"), r#""a\n\u{1b}[31m\"b""#);
        assert_eq!(quoted(&"é".repeat(1000)).chars().count(), SHOWN + 3);
    }
}
