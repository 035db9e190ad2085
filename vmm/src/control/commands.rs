//! Everything that can be asked of a VM process.

use bedplate_api::vmm::{
    ActionType, Balloon, BalloonStats, BootSource, CoreDump, CpuConfig, Drive, DrivePatch, Entropy, FileSystem,
    HintingStatus, Inspection, InstanceInfo, Logger, MachineConfig, MachineConfigPatch, MemoryHotplugStatus, Metrics,
    MmdsConfig, MmdsVersion, NetworkInterface, NetworkInterfacePatch, SerialDevice, SnapshotCreate, SnapshotLoad,
    Status, TargetState, Vcpus, VcpusUpdate, Version, Vsock,
};
use serde_json::Value;

use super::balloon::BalloonCommand;
use super::console::ConsoleCommand;
use super::hotplug::HotplugCommand;
use super::plug::Unplug;
use super::pmem::PmemCommand;

/// One request, understood.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Command {
    /// Always.
    DescribeInstance,
    /// Always.
    DescribeVersion,
    /// Always.
    DescribeConfig,
    /// Always.
    DescribeMachine,
    /// Always.
    DescribeStatus,
    /// After the start.
    Inspect,
    /// Before the start, as all below up to `LoadSnapshot`, except where they say otherwise.
    SetBootSource(BootSource),
    SetMachine(MachineConfig),
    PatchMachine(MachineConfigPatch),
    SetCpu(CpuConfig),
    /// After the start it is plugged, as is a network interface.
    PutDrive(Drive),
    PutNetworkInterface(NetworkInterface),
    /// After the start it is refused.
    PutFileSystem(FileSystem),
    SetMmds(MmdsConfig),
    SetVsock(Vsock),
    SetEntropy(Entropy),
    SetSerial(SerialDevice),
    SetLogger(Logger),
    SetMetrics(Metrics),
    /// Refused: there are no snapshots.
    LoadSnapshot(SnapshotLoad),
    /// Each at its own time.
    Balloon(BalloonCommand),
    /// Likewise.
    Hotplug(HotplugCommand),
    /// Likewise.
    Pmem(PmemCommand),
    /// Likewise.
    Console(ConsoleCommand),
    /// `InstanceStart` before the start, the others after it.
    Act(ActionType),
    /// After the start.
    DescribeVcpus,
    /// After the start.
    PlugVcpus(VcpusUpdate),
    /// After the start.
    ChangeState(TargetState),
    /// After the start, as all below up to `PressPowerButton`.
    PatchDrive(DrivePatch),
    PatchNetworkInterface(NetworkInterfacePatch),
    Unplug(Unplug),
    /// Refused: there are no snapshots.
    CreateSnapshot(SnapshotCreate),
    DumpCore(CoreDump),
    PressPowerButton,
    /// Always, as the two below.
    DescribeMetadata,
    PutMetadata(Value),
    PatchMetadata(Value),
    /// Always.
    Stop,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answer {
    /// 204.
    Done,
    Instance(InstanceInfo),
    Version(Version),
    Config(Value),
    Machine(MachineConfig),
    Status(Status),
    Inspection(Box<Inspection>),
    Metadata(Value),
    Balloon(Balloon),
    BalloonStats(Box<BalloonStats>),
    Hinting(HintingStatus),
    Hotplug(MemoryHotplugStatus),
    Vcpus(Vcpus),
}

impl Command {
    /// What of it Firecracker wants its clients to leave behind, in its words.
    pub(super) fn deprecation(&self) -> Option<&'static str> {
        match self {
            Self::SetMachine(machine) if machine.cpu_template.is_some() => {
                Some("PUT /machine-config: cpu_template field is deprecated.")
            }
            Self::PatchMachine(patch) if patch.cpu_template.is_some() => {
                Some("PATCH /machine-config: cpu_template field is deprecated.")
            }
            Self::SetMmds(mmds) if mmds.version == MmdsVersion::V1 => {
                Some("PUT /mmds/config: V1 is deprecated. Use V2 instead.")
            }
            Self::SetVsock(vsock) if vsock.vsock_id.is_some() => Some("PUT /vsock: vsock_id field is deprecated."),
            Self::LoadSnapshot(load) if load.mem_file_path.is_some() || load.enable_diff_snapshots => {
                Some("PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated.")
            }
            _ => None,
        }
    }
}
