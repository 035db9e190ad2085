//! How much longer a start takes on a node that has nothing of an image of 10 GiB than on one that has it: figures, and no
//! judgement, which most machines would be too busy for. `cargo xtask bench cold` takes them by a clock that is not.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bedplate_api::Digest;
use bedplate_node::vm::dir::VmDir;
use bedplate_tests::inside::{data, figure, rounds, tools};
use bedplate_tests::patience::{until, until_every};
use serde_json::json;

use crate::agent::{Agent, PATIENCE};
use crate::eight::spec;
use crate::repository::{self, Content};

const STATE: &str = "/run/cold";
/// Between two looks at what the guest has said: little beside a start.
const LOOK: Duration = Duration::from_millis(10);

pub fn figures() -> Result<()> {
    tools::tun()?;
    let content = Content { raw: "/run/cold.raw", boots_mib: 96, more_mib: 64, size_mib: Some(10 << 10) };
    let image = repository::image("cold", &content)?;
    fs::remove_file(content.raw)?;
    let mut control = repository::serve()?;
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for round in 1..=rounds() {
        let _ = fs::remove_dir_all(STATE);
        let agent = Agent::start_from(Path::new(STATE), repository::SOCKET, &[])?;
        cold.push(start(&agent, 1, image, &format!("cold start {round}"))?);
        until("the whole image", PATIENCE, || Ok(agent.status()?.images.contains(&image).then_some(())))?;
        stop(&agent, 2)?;
        warm.push(start(&agent, 3, image, &format!("warm start {round}"))?);
        stop(&agent, 4)?;
        agent.kill()?;
    }
    let [cold, warm] = [cold, warm].map(|mut times| {
        times.sort_by(f64::total_cmp);
        times
    });
    let (a, b) = (cold[cold.len() / 2], warm[warm.len() / 2]);
    let spread = |times: &[f64]| format!("{:.2} to {:.2}", times[0], times[times.len() - 1]);
    figure(&format!(
        "from the wish to the guest's init, median of {}: cold {a:.2} s ({}), warm {b:.2} s ({}), ratio {:.2} x",
        cold.len(),
        spread(&cold),
        spread(&warm),
        a / b
    ));
    for (of, samples) in [("cold", cold), ("warm", warm)] {
        data(&json!({"what": "from the wish to the guest's init", "of": of, "unit": "s", "samples": samples}));
    }
    control.kill()?;
    Ok(())
}

/// Asks for a VM and waits until its init speaks; seconds from the wish to there.
fn start(agent: &Agent, generation: u64, image: Digest, what: &str) -> Result<f64> {
    let vm = spec("cold", image);
    let log = VmDir::new(Path::new(STATE), vm.id).serial_log();
    let begun = Instant::now();
    agent.put(generation, std::slice::from_ref(&vm))?;
    until_every(LOOK, "the guest's init", PATIENCE, || {
        Ok(fs::read(&log).is_ok_and(|said| String::from_utf8_lossy(&said).contains("TINY ready")).then_some(()))
    })?;
    let init = begun.elapsed().as_secs_f64();
    let status = agent.status()?;
    let seen = status.vms.first().context("the VM is gone")?;
    let here = seen.copy.map_or_else(
        || "all of the image here".to_owned(),
        |copy| format!("{} of {} MiB of the image here", copy.done >> 20, copy.total >> 20),
    );
    figure(&format!("{what}: init after {init:.2} s, {here}"));
    Ok(init)
}

fn stop(agent: &Agent, generation: u64) -> Result<()> {
    agent.put(generation, &[])?;
    until("the VM is gone", PATIENCE, || Ok(agent.status()?.vms.is_empty().then_some(())))
}
