//! `cargo xtask demo`: the main job, from packages to web pages, told while it happens.

mod options;
mod phases;
mod screen;
mod story;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

pub use options::Options;
use phases::Phases;

use crate::{build, images, setup};

/// Installs, builds, makes images, then shows the main job.
pub fn run(options: &Options) -> Result<()> {
    let interrupt = Interrupt::listen()?;
    let mut phases = Phases::start();
    setup::run()?;
    phases.done("packages");
    println!("building the programs");
    build::programs()?;
    phases.done("build");
    let artifacts = images::make(&|line| println!("{line}"))?;
    phases.done("images");
    interrupt.check()?;
    story::tell(options, &artifacts, &mut phases, &interrupt)
}

/// Ctrl-C, noticed where the story can stop, so that everything is cleaned up on the way out.
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn listen() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&flag)).context("listen for Ctrl-C")?;
        }
        Ok(Self(flag))
    }

    /// An error once it has come.
    fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Waits for it.
    fn wait(&self) -> Result<()> {
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        if self.check().is_ok() {
            signals.forever().next();
        }
        Ok(())
    }
}
