//! How much longer a start takes on a node that has nothing of an image of 10 GiB than on one that has it: figures, and no
//! judgement, which the machine would be too busy for.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use bedplate_api::Digest;
use bedplate_api::node::VmPhase;
use bedplate_node::vm::dir::VmDir;
use bedplate_tests::inside::{figure, tools};
use bedplate_tests::patience::until;

use crate::agent::{Agent, PATIENCE};
use crate::eight::spec;
use crate::repository::{self, Content};

const STATE: &str = "/run/cold";
/// Starts of each kind. One is enough to see that it works; figures to keep want more, and a machine with nothing else to do.
const ROUNDS: usize = 1;

pub fn figures() -> Result<()> {
    tools::tun()?;
    let content = Content { raw: "/run/cold.raw", boots_mib: 96, more_mib: 64, size_mib: Some(10 << 10) };
    let image = repository::image("cold", &content)?;
    fs::remove_file(content.raw)?;
    let mut control = repository::serve()?;
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let _ = fs::remove_dir_all(STATE);
        let agent = Agent::start_from(Path::new(STATE), repository::SOCKET, &[])?;
        cold.push(start(&agent, 1, image, &format!("cold start {round}"))?);
        until("the whole image", PATIENCE, || Ok(agent.status()?.images.contains(&image).then_some(())))?;
        stop(&agent, 2)?;
        warm.push(start(&agent, 3, image, &format!("warm start {round}"))?);
        stop(&agent, 4)?;
        agent.kill()?;
    }
    let [cold, warm] = [cold, warm].map(|starts| Start {
        runs: median(starts.iter().map(|start| start.runs)),
        init: median(starts.iter().map(|start| start.init)),
    });
    for (until, cold, warm) in [("its vCPUs run", cold.runs, warm.runs), ("the guest's init", cold.init, warm.init)] {
        figure(&format!(
            "from the wish until {until}, median of {ROUNDS}: cold {cold:.2} s, warm {warm:.2} s, {:.2} x",
            cold / warm
        ));
    }
    control.kill()?;
    Ok(())
}

/// How long a start took, in seconds from the wish.
struct Start {
    /// Until the vCPUs run.
    runs: f64,
    /// Until the guest's init speaks.
    init: f64,
}

fn median(times: impl Iterator<Item = f64>) -> f64 {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Asks for a VM and waits until its init speaks.
fn start(agent: &Agent, generation: u64, image: Digest, what: &str) -> Result<Start> {
    let vm = spec("cold", image);
    let log = VmDir::new(Path::new(STATE), vm.id).serial_log();
    let begun = Instant::now();
    agent.put(generation, std::slice::from_ref(&vm))?;
    agent.until_all("running vCPUs", |vm| vm.phase == VmPhase::Running)?;
    let runs = begun.elapsed().as_secs_f64();
    until("the guest's init", PATIENCE, || {
        Ok(fs::read(&log).is_ok_and(|said| String::from_utf8_lossy(&said).contains("TINY ready")).then_some(()))
    })?;
    let init = begun.elapsed().as_secs_f64();
    let status = agent.status()?;
    let seen = status.vms.first().context("the VM is gone")?;
    let here = seen.copy.map_or_else(
        || "all of the image here".to_owned(),
        |copy| format!("{} of {} MiB of the image here", copy.done >> 20, copy.total >> 20),
    );
    figure(&format!("{what}: vCPUs {runs:.2} s, init {init:.2} s, {here}"));
    Ok(Start { runs, init })
}

fn stop(agent: &Agent, generation: u64) -> Result<()> {
    agent.put(generation, &[])?;
    until("the VM is gone", PATIENCE, || Ok(agent.status()?.vms.is_empty().then_some(())))
}
