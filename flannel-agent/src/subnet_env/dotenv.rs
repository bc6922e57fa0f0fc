//! The dotenv syntax flanneld's reader accepts: `KEY=value` or `KEY: value`, an `export` before it, quotes around the
//! value, `#` comments. Variables are not expanded: nothing in our file refers to another.

use std::collections::HashMap;

use crate::domain::wording::quoted;

/// The last value of every name.
pub(super) type Variables = HashMap<String, String>;

/// # Errors
/// Quotes the first line that is not an assignment: a file with one is not ours, and none of it is believed.
pub(super) fn parse(text: &str) -> Result<Variables, String> {
    let mut variables = Variables::new();
    for line in text.trim_start_matches('\u{feff}').lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let not_an_assignment = || format!("line {} is no assignment such as FLANNEL_MTU=1472", quoted(line));
        let (name, value) = line.split_once(['=', ':']).ok_or_else(not_an_assignment)?;
        let name = name.strip_prefix("export ").unwrap_or(name).trim();
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(not_an_assignment());
        }
        variables.insert(name.to_owned(), value_of(value.trim()).ok_or_else(not_an_assignment)?.to_owned());
    }
    Ok(variables)
}

/// The value without quotes or comment; `None` when a quote is not closed or something follows it.
fn value_of(text: &str) -> Option<&str> {
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote) {
            let (value, rest) = inner.split_once(quote)?;
            let rest = rest.trim();
            return (rest.is_empty() || rest.starts_with('#')).then_some(value);
        }
    }
    let comment = text
        .char_indices()
        .find(|(at, letter)| {
            *letter == '#'
                && text
                    .get(..*at)
                    .is_some_and(|before| before.is_empty() || before.ends_with(char::is_whitespace))
        })
        .map_or(text.len(), |(at, _)| at);
    text.get(..comment).map(str::trim_end)
}
