//! The main job, step by step.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bedplate_lab::{Accel, Firmware, Forward};
use bedplate_tests::cluster::{CPUS, Vm};
use bedplate_tests::{Artifacts, Cluster, ControlNode, http};
use serde_json::Value;

use super::screen::Screen;
use super::{Interrupt, Options, Phases};

/// Of each blank machine: its VMM image, its image store and its VMs live in it.
const MACHINE_MIB: u64 = 3072;
/// Of each VM.
const VM_MIB: &str = "384";
/// For machines to become nodes and for VMs to boot, where processors are emulated; on real ones it is seconds.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks at what the control node says.
const LOOK: Duration = Duration::from_millis(300);

/// Shows it all. What goes wrong leaves the machines' logs, and says where.
pub fn tell(options: &Options, artifacts: &Artifacts, phases: &mut Phases, interrupt: &Interrupt) -> Result<()> {
    let slots = options.vms_per_node.to_string();
    let cluster = Cluster::new(artifacts, &["--slots-per-node", &slots])?;
    phases.done("control node");
    let mut story = Story { options, artifacts, cluster, screen: Screen::new(), seen: 0, interrupt };
    let told = story.run(phases);
    if told.is_err() && interrupt.check().is_ok() {
        story.screen.settle();
        let logs = story.cluster.keep_logs();
        eprintln!("the consoles of the machines and the control node's log are in {}", logs.display());
    }
    told
}

struct Story<'a> {
    options: &'a Options,
    artifacts: &'a Artifacts,
    cluster: Cluster,
    screen: Screen,
    /// Number of the last event that was shown.
    seen: u64,
    interrupt: &'a Interrupt,
}

impl Story<'_> {
    fn run(&mut self, phases: &mut Phases) -> Result<()> {
        self.screen.say(format!(
            "a control node runs at {}, on a private network ({})",
            ControlNode::ADDRESS,
            self.cluster.network.name()
        ));
        self.screen.say("the VMM image (kernel, bedplate-node as init, bedplate-vmm) goes into its image repository");
        self.cluster.push_vmm_image()?;
        phases.done("VMM image pushed");
        self.power_on()?;
        let nodes = self.watch_nodes()?;
        phases.done("machines became nodes");
        self.fill_tier(nodes)?;
        let vms = self.watch_vms()?;
        phases.done("VMs booted");
        self.fetch_pages(&vms)?;
        phases.done("pages fetched");
        let doors = self.how_to_look_around(&vms)?;
        println!("\nHow long each part took:\n{}", phases.table());
        if !self.options.exit_when_ready {
            println!("Everything stays until Ctrl-C.");
            self.interrupt.wait()?;
            println!("\ncleaning up");
        }
        drop(doors);
        Ok(())
    }

    fn power_on(&mut self) -> Result<()> {
        let (count, accel) = (self.options.nodes, Accel::best());
        let cpus = accel.cpus(CPUS);
        self.screen.say(format!(
            "{count} blank machine(s) are powered on: {cpus} vCPU(s) and {MACHINE_MIB} MiB each, no disk, set to network boot; run by {}",
            accel.describe()
        ));
        for _ in 0..count {
            self.cluster.power_on(Firmware::Bios, MACHINE_MIB)?;
        }
        Ok(())
    }

    /// Shows the machines until they are nodes; meanwhile the application image is imported and pushed.
    fn watch_nodes(&mut self) -> Result<Vec<Value>> {
        let (options, interrupt) = (self.options, self.interrupt);
        let (cluster, screen, seen, disk) =
            (&mut self.cluster, &mut self.screen, &mut self.seen, &self.artifacts.web_disk);
        screen.say("meanwhile the disk image `web` (Debian, systemd, nginx) is imported and pushed to the repository");
        let control = cluster.control.as_ref().context("the control node is away")?;
        let machines = &mut cluster.machines;
        let disk = disk.to_string_lossy();
        std::thread::scope(|scope| {
            let push = scope.spawn(|| -> Result<()> {
                control.run(&["image", "import", &disk, "--name", "web"])?;
                control.run(&["image", "push", "web"])?;
                Ok(())
            });
            let deadline = Instant::now() + PATIENCE;
            let ready = loop {
                events(control, screen, seen)?;
                let nodes = control.list(&["node", "ls"])?;
                show_nodes(screen, &nodes, usize::from(options.nodes));
                if nodes.iter().filter(|node| node["state"] == "ready").count() >= usize::from(options.nodes) {
                    break nodes;
                }
                if let Some(dead) = machines.iter_mut().position(|machine| !machine.is_running()) {
                    bail!("machine {} ended before it became a node", dead + 1);
                }
                pause(interrupt, deadline, "the machines did not become nodes")?;
            };
            screen.settle();
            push.join().map_err(|_| anyhow::anyhow!("the thread that pushes the image died"))??;
            Ok(ready)
        })
    }

    fn fill_tier(&mut self, nodes: Vec<Value>) -> Result<()> {
        let target = self.options.vms().to_string();
        let control = self.cluster.control()?;
        let pool = control.list(&["pool", "ls"])?;
        let names: Vec<_> = pool.iter().filter_map(|entry| entry["name"].as_str()).collect();
        self.screen.say(format!("{} nodes; the free pool has their slots: {}", nodes.len(), names.join(", ")));
        self.screen.say(format!("a tier `web` is created: {target} VMs of the image `web`, {VM_MIB} MiB each"));
        control
            .run(&["tier", "create", "web", "--image", "web", "--target", &target, "--memory", VM_MIB, "--active"])?;
        Ok(())
    }

    /// Shows the VMs until all run and have an address.
    fn watch_vms(&mut self) -> Result<Vec<Vm>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let control = self.cluster.control.as_ref().context("the control node is away")?;
            events(control, &mut self.screen, &mut self.seen)?;
            let vms = self.cluster.vms()?;
            for vm in &vms {
                self.screen.show(&vm.name, &words(vm), vm.copy.filter(|_| vm.phase == "copying"));
            }
            if vms.len() == self.options.vms() && vms.iter().all(|vm| vm.phase == "running" && vm.address.is_some()) {
                self.screen.settle();
                return Ok(vms);
            }
            pause(self.interrupt, deadline, "the VMs did not boot")?;
        }
    }

    fn fetch_pages(&mut self, vms: &[Vm]) -> Result<()> {
        for vm in vms {
            let address = vm.web()?;
            let deadline = Instant::now() + PATIENCE;
            let page = loop {
                match http::get(&self.cluster.network, address) {
                    Ok(page) => break page,
                    // The address is taken a moment before the web server listens.
                    Err(_) => self.screen.show(&vm.name, "its web server is starting", None),
                }
                pause(self.interrupt, deadline, "a web server did not come up")?;
            };
            let heading = page.split_once("<h1>").and_then(|(_, rest)| rest.split_once("</h1>")).map(|(text, _)| text);
            let heading = heading.unwrap_or_default().replace("<code>", "").replace("</code>", "");
            if !heading.contains(&vm.name) {
                bail!("the page at {address} does not name {}: {page}", vm.name);
            }
            self.screen.say(format!("{}: http://{address}/ says: {heading}", vm.name));
        }
        self.screen.settle();
        Ok(())
    }

    /// Opens ways in for a person, and says which.
    fn how_to_look_around(&self, vms: &[Vm]) -> Result<Vec<Forward>> {
        let control = self.cluster.control()?;
        let mut doors = Vec::new();
        println!("\nHow to look around, in another terminal:\n");
        println!("  export BEDPLATE_CONTROL=unix:{}", control.socket().display());
        println!("  alias bedplate={}", self.artifacts.program("bedplate").display());
        println!("  bedplate node ls; bedplate pool ls; bedplate tier ls; bedplate vm ls; bedplate events");
        if let Some(vm) = vms.first() {
            println!("  bedplate vm console {}        # you are root there", vm.name);
        }
        let page = Forward::new(&self.cluster.network, ControlNode::PAGE.parse()?)?;
        println!("  the control node's page: http://{}/", page.address());
        doors.push(page);
        for vm in vms {
            let door = Forward::new(&self.cluster.network, vm.web()?)?;
            println!("  the page of {:<14}: http://{}/", vm.name, door.address());
            doors.push(door);
        }
        println!("  inside their network:     ip netns exec {} curl http://ADDRESS/", self.cluster.network.name());
        Ok(doors)
    }
}

/// Shows what the control node decided and saw since the last look.
fn events(control: &ControlNode, screen: &mut Screen, seen: &mut u64) -> Result<()> {
    for event in control.list(&["events", "--after", &seen.to_string()])? {
        *seen = event["number"].as_u64().unwrap_or(*seen);
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        screen.say(format!("{}: {}", text("subject"), text("message")));
    }
    Ok(())
}

fn show_nodes(screen: &mut Screen, nodes: &[Value], count: usize) {
    for number in 1..=count {
        let mac = format!("52:54:00:be:d0:{number:02x}");
        let node = nodes.iter().find(|node| node["mac"] == mac.as_str());
        let text = match node.and_then(|node| node["state"].as_str()) {
            None => "powered on; its firmware looks for something to boot".to_owned(),
            Some("blank") => "known to the boot service".to_owned(),
            Some("booting") => "fetches the VMM image and boots it".to_owned(),
            Some(state) => format!("is a node now: {}, {state}", node.map_or("", |n| n["name"].as_str().unwrap_or(""))),
        };
        screen.show(&format!("machine {number}"), &text, None);
    }
}

fn words(vm: &Vm) -> String {
    let text = match vm.phase.as_str() {
        "pending" => "has a slot",
        "copying" => "its disk image is copied to the node, each chunk verified",
        "starting" => "its VMM process starts",
        "running" if vm.address.is_none() => "boots from its copy-on-write disk",
        "running" => "has an address",
        other => other,
    };
    let reason = if vm.detail.is_empty() { String::new() } else { format!(" ({})", vm.detail) };
    let address = vm.address.map(|address| format!(" {address}")).unwrap_or_default();
    format!("on {}: {text}{address}{reason}", vm.node)
}

/// A moment between two looks; an error when there was Ctrl-C or the time is over.
fn pause(interrupt: &Interrupt, deadline: Instant, failure: &str) -> Result<()> {
    interrupt.check()?;
    if Instant::now() > deadline {
        bail!("{failure} within {PATIENCE:?}");
    }
    std::thread::sleep(LOOK);
    Ok(())
}
