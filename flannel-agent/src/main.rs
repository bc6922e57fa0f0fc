//! flags → parts → run → exit code.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use flannel_agent::cli::{self, Command, Parsed, Settings, Stream};
use flannel_agent::commands;
use flannel_agent::host::memory;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os(), std::env::vars_os()) {
        Parsed::PrintAndExit { text, stream, code } => {
            // Nobody may be listening; the code says it all the same.
            let _ = match stream {
                Stream::Stdout => std::io::stdout().write_all(text.as_bytes()),
                Stream::Stderr => std::io::stderr().write_all(text.as_bytes()),
            };
            ExitCode::from(code)
        }
        Parsed::Command(Command::Status(command)) => on_runtime(commands::status::run(&command)),
        Parsed::Command(Command::Top(command)) => on_runtime(commands::top::run(&command)),
        Parsed::Command(Command::Cleanup(command)) => on_runtime(commands::cleanup::run(&command)),
        Parsed::Command(Command::Reservations(command)) => on_runtime(commands::reservations::run(&command)),
        Parsed::Command(Command::Migrate(command)) => on_runtime(commands::migrate::run(&command)),
        Parsed::Command(Command::MigrateEtcd(command)) => on_runtime(commands::migrate_etcd::run(&command)),
        Parsed::Daemon(settings) => {
            memory::give_back_what_is_freed();
            log_to_stderr(&settings);
            on_runtime(commands::daemon::run(*settings))
        }
    }
}

/// `RUST_LOG` goes before `-v`.
fn log_to_stderr(settings: &Settings) {
    let level = settings.verbosity.level();
    // kube_client logs each failed call as an error of its own; we say once what it means. netlink_proto warns of each
    // answer that nobody waits for any more: a look at the host that was broken off for something more urgent. The TLS
    // library's verifier logs each certificate that it refuses.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new(format!(
            "warn,kube_client=off,netlink_proto=error,rustls_platform_verifier=off,flannel_agent={level}"
        ))
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

fn on_runtime(work: impl Future<Output = ExitCode>) -> ExitCode {
    // One provider for the whole process; a second call would only say that it is there.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => {
            eprintln!("flannel-agent: can't start its threads: {error}");
            ExitCode::FAILURE
        }
    }
}
