//! Single keys from a terminal, without Return.
//!
//! The terminal is switched to hand over each key at once and to show none of them; Ctrl-C stays a signal. It is put back
//! when this is dropped, and by then at the latest on every way out that runs destructors: callers turn the signals that
//! end a process into ordinary ends. After SIGKILL `reset` helps, as with every program of this kind.

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;

use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, read, tcgetpgrp};
use tokio::io::unix::AsyncFd;

/// The terminal at stdin.
pub(super) struct Keys {
    input: AsyncFd<io::Stdin>,
    before: Termios,
}

impl Keys {
    /// `None` where there is no terminal to ask, or it belongs to another job (a background job that changed it would be
    /// stopped).
    pub(super) fn listen() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() || tcgetpgrp(stdin.as_fd()).ok()? != getpgrp() {
            return None;
        }
        let before = tcgetattr(stdin.as_fd()).ok()?;
        // SAFETY: descriptor 0 stays open, and stays this terminal, for as long as the process runs.
        let input = unsafe { AsyncFd::register(io::stdin()) }.ok()?;
        let mut raw = before.clone();
        raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        // A read returns with what is there, at least one key.
        raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self { input, before })
    }

    /// Returns when `key` was pressed. Others are passed over. Never returns once the terminal is gone.
    pub(super) async fn pressed(&mut self, key: u8) {
        loop {
            let Ok(mut ready) = self.input.readable_mut().await else { return std::future::pending().await };
            // One read per readiness: it does not wait, because something is there.
            let mut bytes = [0; 64];
            match read(io::stdin().as_fd(), &mut bytes) {
                Ok(0) | Err(_) => return std::future::pending().await,
                Ok(count) => {
                    ready.clear_ready();
                    if bytes.iter().take(count).any(|byte| *byte == key) {
                        return;
                    }
                }
            }
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing any more.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}
