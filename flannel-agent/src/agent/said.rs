//! What a pass over the host says: the first few changes of a kind one by one, the rest as a number. One cable that is
//! pulled fails the peers of a large network all at once, and nobody reads ten thousand lines that say the same.

use crate::domain::host_state::Change;
use crate::host::HostError;

use super::retries::PROMPT;

/// Of a kind, one by one.
const FEW: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Said {
    failed: usize,
    done: usize,
    undone: usize,
}

impl Said {
    pub(super) fn failed(&mut self, change: &Change, error: &HostError) {
        let (change, error) = (change.to_string(), error.to_string());
        // Some errors name the change themselves.
        let error = error.strip_prefix(&change).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(&error);
        match one_more(&mut self.failed) {
            true => tracing::error!("{change} failed and will be tried again: {error}"),
            false => tracing::debug!("{change} failed and will be tried again: {error}"),
        }
    }

    /// It had failed before.
    pub(super) fn done_after_all(&mut self, change: &Change) {
        match one_more(&mut self.done) {
            true => tracing::info!("{change}: done after all"),
            false => tracing::debug!("{change}: done after all"),
        }
    }

    /// It was made [`PROMPT`] times and did not last.
    pub(super) fn undone(&mut self, change: &Change) {
        if one_more(&mut self.undone) {
            tracing::warn!(
                "{change}: done {PROMPT} times in a row, and undone within a second each time; from now on it is done \
                 more and more seldom",
            );
        }
    }

    /// At the end of the pass.
    pub(super) fn sum_up(self) {
        let [failed, done, undone] = self.rest();
        if failed > 0 {
            tracing::error!("{failed} more changes failed and will be tried again");
        }
        if done > 0 {
            tracing::info!("{done} more changes that had failed: done after all");
        }
        if undone > 0 {
            tracing::warn!("{undone} more changes are undone again and again, and done more and more seldom");
        }
    }

    /// How many have not been said one by one.
    fn rest(&self) -> [usize; 3] {
        [self.failed, self.done, self.undone].map(|all| all.saturating_sub(FEW))
    }
}

/// Whether this one is among the few.
fn one_more(said: &mut usize) -> bool {
    *said += 1;
    *said <= FEW
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_happens_to_all_peers_at_once_a_few_are_said_and_the_rest_counted() {
        let mut said = Said::default();
        assert_eq!((0..100).filter(|_| one_more(&mut said.failed)).count(), 8);
        assert_eq!((0..8).filter(|_| one_more(&mut said.done)).count(), 8);
        assert_eq!(said.rest(), [92, 0, 0]);
    }
}
