//! Go's flag syntax, which flanneld's users, units and manifests are written in (contract §1.1).
//!
//! No Rust parser has these rules: one dash or two, values in the next word even when it begins with a dash, booleans
//! that take a value only behind `=`, no abbreviations, an end at the first word that is no flag. So argv is split
//! here, into flags with their values, and only the meaning of the values is left to clap.

/// How a flag takes its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Only behind `=`; without one it is true.
    Boolean,
    /// Behind `=` or as the next word.
    Valued,
}

/// A flag as it was given, without dashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) name: String,
    pub(super) value: String,
}

/// Why splitting ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// `-h` or `-help`: Go looks no further.
    Help,
    BadSyntax(String),
    Unknown(String),
    NeedsArgument(String),
    /// A word that is no flag. Go ends there and flanneld silently ignored the rest, so this is an error.
    Positional {
        word: String,
        /// The boolean flag right before it, where `-flag true` was most likely meant as `-flag=true`.
        after_boolean: Option<String>,
    },
}

/// Splits the words after the program's name. `kind` knows the flags there are.
pub(super) fn split(words: &[String], kind: impl Fn(&str) -> Option<Kind>) -> Result<Vec<Given>, Stop> {
    let mut given = Vec::new();
    let mut after_boolean = None;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let positional =
            |word: &String, after_boolean| Stop::Positional { word: word.clone(), after_boolean };
        let Some(flag) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            return Err(positional(word, after_boolean));
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        if flag.is_empty() {
            // `--` ends the flags; what follows would be positional.
            return words.next().map_or(Ok(given), |word| Err(positional(word, None)));
        }
        if flag.starts_with(['-', '=']) {
            return Err(Stop::BadSyntax(word.clone()));
        }
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        if matches!(name, "h" | "help") {
            return Err(Stop::Help);
        }
        after_boolean = None;
        let value = match (kind(name), value) {
            (None, _) => return Err(Stop::Unknown(name.to_owned())),
            (Some(_), Some(value)) => value,
            (Some(Kind::Boolean), None) => {
                after_boolean = Some(name.to_owned());
                "true".to_owned()
            }
            (Some(Kind::Valued), None) => {
                words.next().cloned().ok_or_else(|| Stop::NeedsArgument(name.to_owned()))?
            }
        };
        given.push(Given { name: name.to_owned(), value });
    }
    Ok(given)
}

/// Go's `strconv.ParseBool`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err("not true or false (nor 1, t, T, TRUE, True, 0, f, F, FALSE, False)".to_owned()),
    }
}

/// Go's `strconv.ParseInt(text, 0, 64)`: `0x`, `0o`, `0b` or a leading zero choose the base, underscores may stand
/// between digits when one of them does.
pub(super) fn integer(text: &str) -> Result<i64, String> {
    let not_a_number = || "not a whole number".to_owned();
    let (negative, unsigned) = match text.as_bytes().first() {
        Some(b'-') => (true, text.get(1..).unwrap_or_default()),
        Some(b'+') => (false, text.get(1..).unwrap_or_default()),
        _ => (false, text),
    };
    let lower = unsigned.to_ascii_lowercase();
    let (radix, digits) = if let Some(rest) = lower.strip_prefix("0x") {
        (16, rest)
    } else if let Some(rest) = lower.strip_prefix("0o") {
        (8, rest)
    } else if let Some(rest) = lower.strip_prefix("0b") {
        (2, rest)
    } else if let Some(rest) = lower.strip_prefix('0').filter(|rest| !rest.is_empty()) {
        (8, rest)
    } else {
        (10, lower.as_str())
    };
    // After a prefix one underscore may stand; else only between two digits.
    let digits = if digits.len() < lower.len() { digits.strip_prefix('_').unwrap_or(digits) } else { digits };
    let groups: Vec<&str> = digits.split('_').collect();
    let all_digits = |group: &&str| !group.is_empty() && group.chars().all(|digit| digit.is_digit(radix));
    if !groups.iter().all(all_digits) {
        return Err(not_a_number());
    }
    let sign = if negative { "-" } else { "" };
    i64::from_str_radix(&format!("{sign}{}", groups.concat()), radix)
        .map_err(|_| "out of the range of a 64-bit number".to_owned())
}

/// glog's level: decimal, may be negative.
pub(super) fn level(text: &str) -> Result<i32, String> {
    text.parse().map_err(|_| "not a level: a whole number such as 2".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kind(name: &str) -> Option<Kind> {
        match name {
            "ip-masq" | "version" => Some(Kind::Boolean),
            "iface" | "v" | "etcd-endpoints" => Some(Kind::Valued),
            _ => None,
        }
    }

    /// `name=value …`, or why it ended.
    fn split_line(line: &str) -> String {
        let words: Vec<String> = line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
        match split(&words, kind) {
            Ok(given) => {
                let given: Vec<_> =
                    given.iter().map(|flag| format!("{}={}", flag.name, flag.value)).collect();
                given.join(" ")
            }
            Err(stop) => format!("{stop:?}"),
        }
    }

    #[test]
    fn argv_is_split_as_go_splits_it() {
        for (line, wanted) in [
            ("", ""),
            ("-iface eth0", "iface=eth0"),
            ("--iface eth0", "iface=eth0"),
            ("-iface=eth0", "iface=eth0"),
            ("--iface=eth0", "iface=eth0"),
            ("--iface=", "iface="),
            ("-iface=a=b", "iface=a=b"),
            ("-iface eth0 -iface=eth1 -ip-masq -v=5", "iface=eth0 iface=eth1 ip-masq=true v=5"),
            ("-etcd-endpoints=http://a:1,http://b:2", "etcd-endpoints=http://a:1,http://b:2"),
            ("--ip-masq=false -v 3", "ip-masq=false v=3"),
            ("-ip-masq=T -ip-masq=f -v=-1", "ip-masq=T ip-masq=f v=-1"),
            ("-v -1", "v=-1"),
            // The next word is the value, whatever it looks like.
            ("-iface -ip-masq", "iface=-ip-masq"),
            ("-iface --", "iface=--"),
            ("-iface - -ip-masq", "iface=- ip-masq=true"),
            ("-ip-masq --", "ip-masq=true"),
            ("--", ""),
            // No abbreviations.
            ("-ip", "Unknown(\"ip\")"),
            ("-nosuch=1", "Unknown(\"nosuch\")"),
            ("-iface", "NeedsArgument(\"iface\")"),
            ("-v=1 --iface", "NeedsArgument(\"iface\")"),
            ("---iface", "BadSyntax(\"---iface\")"),
            ("-=x", "BadSyntax(\"-=x\")"),
            ("--=x", "BadSyntax(\"--=x\")"),
            ("-h", "Help"),
            ("--help", "Help"),
            ("-help=false", "Help"),
            ("-v 1 -h -nosuch", "Help"),
            ("-nosuch -h", "Unknown(\"nosuch\")"),
            ("x -h", "Positional { word: \"x\", after_boolean: None }"),
            ("-", "Positional { word: \"-\", after_boolean: None }"),
            ("-v 1 x", "Positional { word: \"x\", after_boolean: None }"),
            ("-- -v", "Positional { word: \"-v\", after_boolean: None }"),
            ("-ip-masq false -v 1", "Positional { word: \"false\", after_boolean: Some(\"ip-masq\") }"),
            ("-ip-masq -v 1 false", "Positional { word: \"false\", after_boolean: None }"),
            ("-ip-masq=true false", "Positional { word: \"false\", after_boolean: None }"),
        ] {
            assert_eq!(split_line(line), wanted, "{line}");
        }
    }

    #[test]
    fn booleans_have_gos_spellings() {
        for text in ["1", "t", "T", "TRUE", "true", "True"] {
            assert_eq!(boolean(text), Ok(true), "{text}");
        }
        for text in ["0", "f", "F", "FALSE", "false", "False"] {
            assert_eq!(boolean(text), Ok(false), "{text}");
        }
        for text in ["", "yes", "no", "on", "tRUE", "2", " true"] {
            assert!(boolean(text).is_err(), "{text}");
        }
    }

    #[test]
    fn integers_have_gos_bases() {
        for (text, wanted) in [
            ("0", Some(0)),
            ("60", Some(60)),
            ("+60", Some(60)),
            ("-1", Some(-1)),
            ("0x10", Some(16)),
            ("-0X1f", Some(-31)),
            ("010", Some(8)),
            ("0o17", Some(15)),
            ("0b101", Some(5)),
            ("1_000", Some(1000)),
            ("0x_ff", Some(255)),
            ("0_7", Some(7)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("", None),
            ("-", None),
            ("+-1", None),
            ("--1", None),
            ("0x", None),
            ("0x-1", None),
            ("08", None),
            ("1__0", None),
            ("_1", None),
            ("1_", None),
            ("abc", None),
            ("1.0", None),
            ("1e3", None),
            (" 1", None),
            ("１", None),
        ] {
            assert_eq!(integer(text).ok(), wanted, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_words_make_it_panic(words in proptest::collection::vec("[-=a-z]{0,6}|iface|-v|--ip-masq|.{0,8}", 0..8)) {
            let _ = split(&words, kind);
        }

        #[test]
        fn any_number_is_read_back(number: i64) {
            prop_assert_eq!(integer(&number.to_string()), Ok(number));
        }

        #[test]
        fn no_text_makes_a_number_panic(text in "[-+0-9a-fxo_]{0,24}|.{0,8}") {
            let _ = integer(&text);
            let _ = level(&text);
        }
    }
}
