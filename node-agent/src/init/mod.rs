//! PID 1 of the VMM image: makes a bare kernel a place where the agent can work, and then waits.
//!
//! The main thread mounts, loads modules, starts the agent as its child and from then on does nothing but wait for signals:
//! it reaps every orphan (VM processes outlive their agent and come to us when it dies) after writing down how it ended,
//! starts the agent again with back-off, and takes the machine down in order. The network and the power key have a thread each.
//!
//! Absences: no VM and no HTTP in this process but the one question after the time. Nothing here may end: when PID 1
//! ends, the machine does.

mod agent;
mod clock;
mod cmdline;
mod console;
mod modules;
mod mounts;
mod network;
mod one_vm;
mod power;
mod signals;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use cmdline::BootOptions;
use console::say;
use signals::{Signals, Woken};

/// A machine that found this file in its initramfs runs the one VM that it describes, and nothing else.
const ONE_VM: &str = "/bedplate/run.json";
/// How long the agent may take to stop every VM: it gives each guest a minute, and the hard ways another few seconds.
const LEAVING: Duration = Duration::from_secs(80);

/// Runs the machine. Called as PID 1 only.
pub fn main() -> ! {
    // From the first moment on: a signal must not find us without an answer to it.
    let signals = Signals::block();
    mounts::mount_all();
    console::attach();
    let text = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let (options, unknown) = cmdline::parse(&text);
    for word in unknown {
        say(&format!("{word} on the kernel's command line is not understood and is ignored"));
    }
    modules::load_all(&text);
    if let Err(e) = rustix::system::sethostname(b"bedplate-node") {
        say(&format!("the host name could not be set: {e}"));
    }
    power::watch_key();
    if Path::new(ONE_VM).exists() {
        one_vm::run(ONE_VM, &signals);
    } else {
        host_vms(options, &signals);
    }
    power::off()
}

/// Keeps the agent running until the machine shall go down.
fn host_vms(options: BootOptions, signals: &Signals) {
    let mut agent = agent::Supervised::new(options.clone());
    network::run_in_thread(options);
    loop {
        agent.start_if_due();
        match signals.wait(agent.next_start()) {
            Woken::Child => {
                for ended in signals::reap() {
                    agent.note_end(&ended);
                }
            }
            Woken::Network => agent.allow(),
            Woken::Down => break,
            Woken::Nothing => {}
        }
    }
    say("going down: VMs are stopped");
    agent.leave();
    let deadline = Instant::now() + LEAVING;
    while agent.is_running() && Instant::now() < deadline {
        if matches!(signals.wait(Some(Duration::from_secs(1))), Woken::Child) {
            for ended in signals::reap() {
                agent.note_end(&ended);
            }
        }
    }
}
