//! Everything that can be asked of a VM process.

use bedplate_api::vmm::{
    ActionType, Balloon, BalloonStats, BootSource, Drive, Entropy, HintingStatus, InstanceInfo, Logger, MachineConfig,
    MachineConfigPatch, MemoryHotplugStatus, Metrics, NetworkInterface, SerialDevice, Status, TargetState, Version,
    VmConfig, Vsock,
};

use super::balloon::BalloonCommand;
use super::hotplug::HotplugCommand;

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
    /// Before the start, as all below up to `SetMetrics`.
    SetBootSource(BootSource),
    SetMachine(MachineConfig),
    PatchMachine(MachineConfigPatch),
    PutDrive(Drive),
    PutNetworkInterface(NetworkInterface),
    SetVsock(Vsock),
    SetEntropy(Entropy),
    SetSerial(SerialDevice),
    SetLogger(Logger),
    SetMetrics(Metrics),
    /// Each at its own time.
    Balloon(BalloonCommand),
    /// Likewise.
    Hotplug(HotplugCommand),
    /// `InstanceStart` before the start, the others after it.
    Act(ActionType),
    /// After the start.
    ChangeState(TargetState),
    /// After the start.
    PressPowerButton,
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
    Config(Box<VmConfig>),
    Machine(MachineConfig),
    Status(Status),
    Balloon(Balloon),
    BalloonStats(Box<BalloonStats>),
    Hinting(HintingStatus),
    Hotplug(MemoryHotplugStatus),
}
