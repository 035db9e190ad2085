//! A control node and the blank machines on its network.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bedplate_lab::{Firmware, Machine, MachineSpec, Network};
use serde_json::Value;

use crate::patience::until;
use crate::{Artifacts, ControlNode};

/// vCPUs that each machine asks for; an emulated one has fewer.
pub const CPUS: u8 = 2;

/// A private network with a control node, and machines that boot from it.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: machines, control node, network.
    /// The machines that are powered on.
    pub machines: Vec<Machine>,
    /// The control node; `None` while it is away.
    pub control: Option<ControlNode>,
    /// Where they meet.
    pub network: Network,
    artifacts: Artifacts,
    /// State of the control node, image store, firmware variables.
    dir: tempfile::TempDir,
    options: Vec<String>,
    powered_on: u8,
}

impl Cluster {
    /// A control node, started with `options` beside the usual, and no machine yet.
    pub fn new(artifacts: &Artifacts, options: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("bedplate-").tempdir().context("make a directory for the cluster")?;
        let address: Ipv4Addr = ControlNode::ADDRESS.parse()?;
        let network = Network::new(address, 24)?;
        let mut cluster = Self {
            machines: Vec::new(),
            control: None,
            network,
            artifacts: artifacts.clone(),
            dir,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            powered_on: 0,
        };
        cluster.start_control()?;
        Ok(cluster)
    }

    /// Where state is kept while the cluster lives.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts the control node, on the state that an earlier one left.
    pub fn start_control(&mut self) -> Result<()> {
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        self.control = Some(ControlNode::start(&self.artifacts, &self.network, self.dir.path(), &options)?);
        Ok(())
    }

    /// Keeps the serial logs of all machines, and returns where they are: something went wrong.
    pub fn keep_logs(&self) -> &Path {
        self.machines.iter().for_each(|machine| machine.console().keep_log());
        &self.artifacts.logs
    }

    /// The control node.
    pub fn control(&self) -> Result<&ControlNode> {
        self.control.as_ref().context("the control node is away")
    }

    /// Imports the VMM image and hands it to the control node; blank machines boot it from then on.
    pub fn push_vmm_image(&self) -> Result<()> {
        let (kernel, initrd) =
            (self.artifacts.vmm_kernel.to_string_lossy(), self.artifacts.vmm_initrd.to_string_lossy());
        let control = self.control()?;
        control.run(&["image", "import-vmm", "--kernel", &kernel, "--initrd", &initrd, "--name", "vmm"])?;
        control.run(&["image", "push", "vmm"])?;
        Ok(())
    }

    /// Imports a disk and hands it to the control node.
    pub fn push_disk_image(&self, name: &str, disk: &Path) -> Result<()> {
        let control = self.control()?;
        control.run(&["image", "import", &disk.to_string_lossy(), "--name", name])?;
        control.run(&["image", "push", name])?;
        Ok(())
    }

    /// Powers a blank machine on; it boots from the network. Its place in `machines`.
    pub fn power_on(&mut self, firmware: Firmware, memory_mib: u64) -> Result<usize> {
        self.powered_on += 1;
        let mac = format!("52:54:00:be:d0:{:02x}", self.powered_on);
        let spec = MachineSpec::new(format!("machine-{}", self.powered_on), &self.artifacts.logs);
        let spec = spec.cpus(CPUS).memory_mib(memory_mib).firmware(firmware).network(&self.network, &mac)?;
        self.machines.push(spec.start()?);
        Ok(self.machines.len() - 1)
    }

    /// Waits until `count` nodes are ready.
    pub fn wait_for_nodes(&self, count: usize, timeout: Duration) -> Result<Vec<Value>> {
        until(&format!("{count} nodes ready"), timeout, || {
            let mut nodes = self.control()?.list(&["node", "ls"])?;
            nodes.retain(|node| node["state"] == "ready");
            Ok((nodes.len() >= count).then_some(nodes))
        })
    }

    /// Waits until `count` VMs run and have taken an address.
    pub fn wait_for_vms(&self, count: usize, timeout: Duration) -> Result<Vec<Vm>> {
        until(&format!("{count} VMs running with an address"), timeout, || {
            let vms = self.vms()?;
            let running: Vec<_> = vms.into_iter().filter(|vm| vm.phase == "running" && vm.address.is_some()).collect();
            Ok((running.len() == count).then_some(running))
        })
    }

    /// The VMs as the control node lists them.
    pub fn vms(&self) -> Result<Vec<Vm>> {
        Ok(self.control()?.list(&["vm", "ls"])?.iter().map(Vm::from_json).collect())
    }
}

/// What a test wants to know of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Name.
    pub name: String,
    /// Id of this incarnation.
    pub id: String,
    /// Name of its node.
    pub node: String,
    /// Where it stands.
    pub phase: String,
    /// Why.
    pub detail: String,
    /// Its address, once it has taken it.
    pub address: Option<Ipv4Addr>,
    /// Bytes of its image on the node and in all, while they are copied.
    pub copy: Option<(u64, u64)>,
    /// How often it was started again.
    pub restarts: u64,
}

impl Vm {
    fn from_json(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let copy = &value["copy"];
        Self {
            name: text("name"),
            id: text("id"),
            node: text("node"),
            phase: text("phase"),
            detail: text("detail"),
            address: text("address").parse().ok(),
            copy: copy["done"].as_u64().zip(copy["total"].as_u64()),
            restarts: value["restarts"].as_u64().unwrap_or(0),
        }
    }

    /// Where its web server listens.
    pub fn web(&self) -> Result<SocketAddr> {
        let address = self.address.with_context(|| format!("{} has no address", self.name))?;
        Ok(SocketAddr::from((address, 80)))
    }
}
