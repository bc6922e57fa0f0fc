//! The lab that the tests share. It lives on a thread of its own, because what is started from a thread ends with it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, anyhow};
use flannel_tests::topology::{Lab, Underlay};
use libtest_mimic::{Failed, Trial};

type Job = Box<dyn FnOnce(&mut Option<Lab>) + Send>;

/// One test at a time, on whatever hosts.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other test runs.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two hosts, built when the first test needs them; gone with the last clone of this.
#[derive(Clone)]
pub(crate) struct Hosts {
    underlay: Underlay,
    keeper: Arc<Mutex<Option<Keeper>>>,
}

struct Keeper {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Hosts {
    pub(crate) fn on(underlay: Underlay) -> Self {
        Self { underlay, keeper: Arc::default() }
    }

    /// A trial on the shared hosts.
    pub(crate) fn trial(
        &self,
        sentence: impl Into<String>,
        test: impl FnOnce(&mut Lab) -> Result<()> + Send + 'static,
    ) -> Trial {
        let hosts = self.clone();
        Trial::test(sentence, move || hosts.run(test).map_err(|e| Failed::from(format!("{e:#}"))))
    }

    fn run(&self, test: impl FnOnce(&mut Lab) -> Result<()> + Send + 'static) -> Result<()> {
        let _turn = turn();
        let underlay = self.underlay;
        let (answer, answered) = mpsc::channel();
        let job: Job = Box::new(move |place| {
            let _ = answer.send(on(place, underlay, test));
        });
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = keeper.get_or_insert_with(Keeper::start).jobs.as_ref();
        jobs.context("the hosts are gone")?.send(job).map_err(|_| anyhow!("the hosts' thread ended"))?;
        drop(keeper);
        answered.recv().context("the test panicked")?
    }
}

/// A lab on which a test failed is not used again.
fn on(place: &mut Option<Lab>, underlay: Underlay, test: impl FnOnce(&mut Lab) -> Result<()>) -> Result<()> {
    let mut lab = match place.take() {
        Some(lab) => lab,
        None => Lab::new("kernels").underlay(underlay).build()?,
    };
    let result = test(&mut lab);
    lab.verdict(result)?;
    *place = Some(lab);
    Ok(())
}

impl Keeper {
    fn start() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = thread::spawn(move || {
            let mut lab = None;
            for job in queue {
                job(&mut lab);
            }
        });
        Self { jobs: Some(jobs), thread: Some(thread) }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
