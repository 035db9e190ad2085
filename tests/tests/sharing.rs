//! Many nodes that want the same image at once: agents on this machine, on one private network with the control node.
//! What is looked at is who sends the image to whom, so that the VMs need not run: their VMM is a program that fails.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use bedplate_lab::Process;
use bedplate_tests::patience::until;
use bedplate_tests::{Artifacts, Cluster, ControlNode};

const PATIENCE: Duration = Duration::from_secs(300);
const NODES: usize = 8;
/// Of noise, which nothing compresses, behind a disk with a kernel, which is small beside it.
const IMAGE_MIB: u64 = 96;

#[test]
fn eight_nodes_at_once_take_an_image_from_the_repository_about_once() -> Result<()> {
    let Some(artifacts) = Artifacts::or_skip("sharing") else { return Ok(()) };
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm, and agents copy no image for VMs that could not run");
        return Ok(());
    }
    let cluster = Cluster::new(&artifacts, &[])?;
    let agents = Agents::start(&cluster, &artifacts)?;
    let done = share(&cluster, &artifacts, &agents);
    if done.is_err() {
        agents.show();
        println!("the control node's log is in {}", cluster.keep_logs().display());
    }
    done
}

fn share(cluster: &Cluster, artifacts: &Artifacts, agents: &Agents) -> Result<()> {
    let control = cluster.control()?;
    let disk = cluster.dir().join("noise.raw");
    std::fs::copy(&artifacts.tiny_disk, &disk)?;
    let mut noise = File::open("/dev/urandom")?.take(IMAGE_MIB << 20);
    std::io::copy(&mut noise, &mut File::options().append(true).open(&disk)?)?;
    cluster.push_disk_image("noise", &disk)?;
    cluster.wait_for_nodes(NODES, PATIENCE)?;
    control.run(&["tier", "create", "noise", "--image", "noise", "--target", &NODES.to_string(), "--active"])?;
    let got = until("every node has the image", PATIENCE, || agents.got())?;
    let (repository, peers) = got.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    println!(
        "{NODES} nodes took {repository} MiB from the repository and {peers} MiB from each other: {:.2} × the image of \
         {IMAGE_MIB} MiB left the repository",
        repository as f64 / IMAGE_MIB as f64
    );
    // Half of it more is room for chunks that a peer did not have in time.
    ensure!(2 * repository <= 3 * IMAGE_MIB, "the repository sent {repository} MiB: {got:?}");
    ensure!(repository + peers >= (NODES as u64) * (IMAGE_MIB - 1), "not everything was counted: {got:?}");
    Ok(())
}

/// Agents whose VMs never run.
struct Agents {
    logs: Vec<PathBuf>,
    _processes: Vec<Process>,
}

impl Agents {
    fn start(cluster: &Cluster, artifacts: &Artifacts) -> Result<Self> {
        let token = cluster.dir().join("control/node.token");
        let mut agents = Self { logs: Vec::new(), _processes: Vec::new() };
        for number in 1..=NODES {
            let state = cluster.dir().join(format!("node-{number}"));
            let log = state.with_extension("log");
            let mut command = Command::new(artifacts.program("bedplate-node"));
            command.args(["agent", "--slots", "1", "--vmm", "/bin/false", "--state"]).arg(state);
            command.args(["--control", &format!("http://{}:{}", ControlNode::ADDRESS, ControlNode::NODE_PORT)]);
            command.args(["--listen", &format!("{}:0", ControlNode::ADDRESS), "--token-file"]).arg(&token);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
            cluster.network.enter(&mut command);
            agents._processes.push(Process::start(format!("agent {number}"), command)?);
            agents.logs.push(log);
        }
        Ok(agents)
    }

    /// MiB that each got from the repository and from its peers, once all have the image.
    fn got(&self) -> Result<Option<Vec<(u64, u64)>>> {
        let mut got = Vec::new();
        for log in &self.logs {
            let text = std::fs::read_to_string(log)?;
            let Some(line) = text.lines().find(|line| line.contains("is here whole")) else { return Ok(None) };
            let figures = line.split(' ').zip(line.split(' ').skip(1)).filter(|(_, unit)| *unit == "MiB");
            let figures: Vec<u64> = figures.filter_map(|(number, _)| number.parse().ok()).collect();
            let [repository, peers] = figures[..] else { anyhow::bail!("what is this: {line}") };
            got.push((repository, peers));
        }
        Ok(Some(got))
    }

    fn show(&self) {
        let mut out = std::io::stdout().lock();
        for log in &self.logs {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let last = text.lines().rev().take(15).collect::<Vec<_>>();
            let _ = writeln!(out, "--- {}", log.display());
            last.iter().rev().for_each(|line| drop(writeln!(out, "{line}")));
        }
    }
}
