//! Values under `/proc/sys`.
//!
//! Keys are in slash form, as the kernel's files are named: device names may hold dots (`eth0.100`), which the dotted
//! form can't tell from separators. `/proc/sys/net` shows the network namespace of the thread that opens the file, so
//! the calls are synchronous and stay on the caller's thread; the kernel answers from memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::HostError;
use crate::domain::host_state::{HostItem, Sysctl};

/// The value of `key`, its parts (`4096 131072 6291456`) separated by single spaces.
///
/// # Errors
/// The key is not one, or this kernel does not have it.
pub fn read(key: &str) -> Result<String, HostError> {
    let doing = || format!("read sysctl {key}");
    let path = path_of(key).map_err(|reason| HostError::new(doing(), reason))?;
    match fs::read_to_string(path) {
        Ok(value) => Ok(single_spaced(&value)),
        Err(e) => Err(HostError::new(doing(), explain(&e))),
    }
}

/// Writes the value, unless it is there already: where `/proc/sys` is read-only, as in most containers, what
/// someone else has set right is right.
///
/// # Errors
/// As [`read`]; a read-only `/proc/sys`, a value the kernel refuses.
pub fn write(sysctl: &Sysctl) -> Result<(), HostError> {
    let doing = || format!("put {}", HostItem::Sysctl(sysctl.clone()));
    let path = path_of(&sysctl.key).map_err(|reason| HostError::new(doing(), reason))?;
    if fs::read_to_string(&path).is_ok_and(|value| single_spaced(&value) == single_spaced(&sysctl.value)) {
        return Ok(());
    }
    fs::write(path, &sysctl.value).map_err(|e| HostError::new(doing(), explain(&e)))
}

/// The kernel separates with tabs, people with spaces.
fn single_spaced(value: &str) -> String {
    value.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn path_of(key: &str) -> Result<PathBuf, String> {
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-@:".contains(&b))
    };
    if key.split('/').all(plain) && key.contains('/') {
        Ok(Path::new("/proc/sys").join(key))
    } else {
        Err(format!("{key:?} is not a key: it would be like net/ipv4/conf/eth0/rp_filter"))
    }
}

fn explain(error: &io::Error) -> String {
    let text = super::netlink::describe_io(error);
    match error.raw_os_error() {
        Some(libc::EROFS) => {
            format!(
                "{text}: /proc/sys is mounted read-only, as in an unprivileged container; set it on the host"
            )
        }
        Some(libc::EACCES) => format!("{text}: needs root in the network namespace's user namespace"),
        Some(libc::ENOENT) => {
            format!(
                "{text}: the device is gone, or this kernel lacks the feature (is IPv6 off, a module missing?)"
            )
        }
        Some(libc::EINVAL) => format!("{text}: the kernel does not take this value"),
        _ => text,
    }
}

/// Major and minor number of the running kernel.
pub fn kernel_release() -> Option<(u32, u32)> {
    release(&read("kernel/osrelease").ok()?)
}

fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_can_not_leave_proc_sys() {
        for key in [
            "",
            "net",
            "/etc/passwd",
            "net/../../etc/passwd",
            "net/..",
            "../net/x",
            "net//ipv4",
            "net/ipv4/",
            "net/./ipv4",
            "net/ipv4\0",
            "net/ipv4 x",
            "net/ipv4\n",
            "net/fö",
        ] {
            assert!(path_of(key).is_err(), "{key:?}");
        }
        for key in
            ["net/ipv4/ip_forward", "net/ipv4/conf/eth0.100/rp_filter", "net/ipv6/conf/br-1_a@x/accept_ra"]
        {
            assert_eq!(path_of(key), Ok(Path::new("/proc/sys").join(key)), "{key:?}");
        }
    }

    #[test]
    fn a_failed_write_names_key_value_and_cause() {
        let sysctl = Sysctl { key: "net/ipv4/conf/nosuchdevice0/rp_filter".into(), value: "2".into() };
        let text = write(&sysctl).unwrap_err().to_string();
        assert!(
            text.starts_with("put sysctl net/ipv4/conf/nosuchdevice0/rp_filter=2: no such file"),
            "{text}"
        );
        assert!(text.contains("the device is gone"), "{text}");
    }

    #[test]
    fn a_value_that_is_right_already_is_not_written() {
        // Nobody can write this one, so a write would fail.
        let key = "kernel/osrelease".to_owned();
        let value = read(&key).unwrap();
        assert!(!value.is_empty() && !value.ends_with('\n'));
        assert_eq!(write(&Sysctl { key, value }), Ok(()));
        assert_eq!(single_spaced("4096\t131072\t 6291456\n"), "4096 131072 6291456");
    }

    #[test]
    fn a_kernel_release_is_two_numbers() {
        for (text, wanted) in [("6.1.0-56-amd64", Some((6, 1))), ("7.3.4\n", Some((7, 3))), ("linux", None)] {
            assert_eq!(release(text), wanted);
        }
    }
}
