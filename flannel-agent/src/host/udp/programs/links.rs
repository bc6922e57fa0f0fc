//! Pinned links: what holds a program on its interface while nobody runs. Taking over the one that is there, asking
//! whether it is still the right one, and leaving a new one behind.

use std::io;
use std::path::Path;

use aya::programs::ProgramError;
use aya::programs::links::{FdLink, LinkError, PinnedLink};

use super::inspect::{self, LinkKind};
use super::pins;
use crate::host::udp::errno::Refusal;

/// What a pin had to offer.
pub(super) enum Adopted {
    /// This very program is already there.
    InPlace,
    /// A link to the right hook, with another program.
    Update(FdLink),
    Nothing,
}

pub(super) enum AdoptError {
    Io(io::Error),
    Link(LinkError),
}

impl AdoptError {
    pub(super) fn into_refusal(self, doing: String) -> Refusal {
        match self {
            Self::Io(e) => Refusal::from_io(doing, &e),
            Self::Link(e) => Refusal::from_link(doing, &e),
        }
    }
}

/// The link pinned at `pin` if it is of this kind and hangs on this interface; any other is let go.
pub(super) fn adopt(pin: &Path, kind: LinkKind, ifindex: u32, program: u32) -> Result<Adopted, AdoptError> {
    match inspect::pinned_link(pin).map_err(AdoptError::Io)? {
        None => Ok(Adopted::Nothing),
        Some(link) if link.kind == kind && link.ifindex == ifindex => {
            if link.program == program {
                return Ok(Adopted::InPlace);
            }
            PinnedLink::from_pin(pin).map(|link| Adopted::Update(link.into())).map_err(AdoptError::Link)
        }
        Some(other) => {
            tracing::info!("letting go of {}: {}", pin.display(), misplaced(&other, kind, ifindex));
            pins::drop_link(pin).map_err(AdoptError::Io)?;
            Ok(Adopted::Nothing)
        }
    }
}

pub(super) fn check_link(pin: &Path, kind: LinkKind, ifindex: u32, program: u32) -> Result<(), String> {
    match inspect::pinned_link(pin) {
        Ok(Some(link)) if link.kind != kind || link.ifindex != ifindex => {
            Err(misplaced(&link, kind, ifindex))
        }
        Ok(Some(link)) if link.program != program => {
            Err(format!("program {} is attached, not {program}", link.program))
        }
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(format!("the pin {} is gone", pin.display())),
        Err(e) => Err(format!("the pin {} can't be read: {e}", pin.display())),
    }
}

fn misplaced(link: &inspect::LinkState, kind: LinkKind, ifindex: u32) -> String {
    if link.kind != kind {
        format!("it is a link to {:?}, not {kind:?}", link.kind)
    } else if link.ifindex == 0 {
        "its interface is gone".to_owned()
    } else {
        format!("it is a link to interface {}, not {ifindex}", link.ifindex)
    }
}

pub(super) fn is_severed(error: &ProgramError) -> bool {
    matches!(error, ProgramError::SyscallError(e) if e.io_error.raw_os_error() == Some(libc::ENOLINK))
}

/// From here on the file holds the link; our descriptor is closed.
pub(super) fn pin_link(
    link: Result<FdLink, LinkError>,
    pin: &Path,
    doing: impl Fn() -> String,
) -> Result<(), Refusal> {
    let link = link.map_err(|e| Refusal::from_link(doing(), &e))?;
    drop(link.pin(pin).map_err(|e| Refusal::from_pin(doing(), &e))?);
    Ok(())
}
