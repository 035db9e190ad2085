//! Attaching the platform devices, one function each.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use bedplate_api::vmm::ExitReason;
use bedplate_devices::bus::Bus;
use bedplate_devices::pci::ConfigPorts;
use bedplate_devices::platform::{
    AcpiPm, BOOT_TIMER_LEN, BootTimer, Booted, COMMAND_LEN, COMMAND_PORT, CONTROL_PORT, CONTROL_PORT_LEN, ControlPort,
    DEBUG_PORT, DEBUG_PORT_LEN, DebugLine, DebugPort, EjectSink, FW_CFG_LEN, FW_CFG_PORT, FwCfg, HOTPLUG_LEN,
    HotplugPort, HotplugSignals, I8042, IrqLine, PIT_LEN, PIT_PORT, PM_BLOCK_LEN, Pit, PowerRequest, PowerSink,
    RTC_LEN, Rtc, SERIAL_LEN, SPEAKER_LEN, SPEAKER_PORT, SerialPort, Speaker,
};
use vmm_sys_util::eventfd::EventFd;

use super::BuildError;
use super::lifecycle::Lifecycle;
use super::ports;
use crate::acpi;
use crate::kvm::Interrupts;
use crate::memory::layout;

/// The serial port as the console uses it.
pub struct SerialLine {
    /// The port, for input.
    pub port: Arc<Mutex<SerialPort>>,
    /// Signalled when the guest has read all input.
    pub drained: EventFd,
}

impl SerialLine {
    /// Another handle to it.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { port: Arc::clone(&self.port), drained: self.drained.try_clone()? })
    }
}

/// What the guest asks of the machine ends it.
fn power_sink(life: &Arc<Lifecycle>) -> PowerSink {
    let life = Arc::clone(life);
    Box::new(move |request| match request {
        PowerRequest::Off => life.end(ExitReason::GuestPowerOff, "the guest powered off"),
        PowerRequest::Reset => life.end(ExitReason::GuestReset, "the guest reset itself"),
    })
}

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

pub(super) fn attach_serial(
    ports: &Bus,
    interrupts: &Interrupts,
    out: Box<dyn Write + Send>,
) -> Result<SerialLine, BuildError> {
    let irq = interrupts.edge(ports::SERIAL_IRQ)?;
    let drained = event().map_err(BuildError::Host)?;
    let for_port = drained.try_clone().map_err(BuildError::Host)?;
    let port = Arc::new(Mutex::new(SerialPort::new(irq, for_port, out)));
    ports.insert(ports::SERIAL.into(), SERIAL_LEN, Arc::clone(&port) as _)?;
    Ok(SerialLine { port, drained })
}

pub(super) fn attach_rtc(ports: &Bus, clock: Rtc) -> Result<(), BuildError> {
    Ok(ports.insert(ports::RTC.into(), RTC_LEN, Arc::new(Mutex::new(clock)))?)
}

pub(super) fn attach_i8042(ports: &Bus, life: &Arc<Lifecycle>) -> Result<(), BuildError> {
    let chip = I8042::new(power_sink(life));
    Ok(ports.insert(COMMAND_PORT, COMMAND_LEN, Arc::new(Mutex::new(chip)))?)
}

pub(super) fn attach_pit(ports: &Bus, interrupts: &Interrupts) -> Result<(), BuildError> {
    let pit = Arc::new(Mutex::new(Pit::new(interrupts.level(ports::PIT_IRQ))));
    ports.insert(PIT_PORT, PIT_LEN, Arc::clone(&pit) as _)?;
    Ok(ports.insert(SPEAKER_PORT, SPEAKER_LEN, Arc::new(Mutex::new(Speaker::new(pit))))?)
}

pub(super) fn attach_acpi(
    ports: &Bus,
    interrupts: &Interrupts,
    life: &Arc<Lifecycle>,
) -> Result<Arc<Mutex<AcpiPm>>, BuildError> {
    let pm = Arc::new(Mutex::new(AcpiPm::new(power_sink(life), interrupts.level(acpi::SCI))));
    ports.insert(acpi::PM_PORT.into(), PM_BLOCK_LEN, Arc::clone(&pm) as _)?;
    Ok(pm)
}

/// The level behind an ACPI event.
struct HotplugEvent(Arc<Mutex<AcpiPm>>);

impl IrqLine for HotplugEvent {
    fn set(&self, asserted: bool) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).set_hotplug(asserted);
    }
}

/// What tells the guest of devices that come and go, and of vCPUs that come, through the ACPI registers `power`. So many
/// vCPUs are there from the start.
pub(super) fn hotplug_signals(power: &Arc<Mutex<AcpiPm>>, vcpus: u8) -> HotplugSignals {
    HotplugSignals::new(Box::new(HotplugEvent(Arc::clone(power))), vcpus)
}

pub(super) fn attach_hotplug(ports: &Bus, signals: &HotplugSignals, sink: EjectSink) -> Result<(), BuildError> {
    let port = HotplugPort::new(signals.clone(), sink);
    Ok(ports.insert(acpi::HOTPLUG_PORT.into(), HOTPLUG_LEN, Arc::new(Mutex::new(port)))?)
}

pub(super) fn attach_boot_timer(mmio: &Bus, booted: Booted) -> Result<(), BuildError> {
    let timer = Arc::new(Mutex::new(BootTimer::new(booted)));
    Ok(mmio.insert(layout::BOOT_TIMER, BOOT_TIMER_LEN, timer)?)
}

/// What only firmware and the boot loader after it need: its configuration, two more ways to reset, and a port for its
/// words, if somebody wants to read them.
pub(super) fn attach_for_firmware(
    ports: &Bus,
    config_ports: &Mutex<ConfigPorts>,
    life: &Arc<Lifecycle>,
    items: FwCfg,
    words: Option<DebugLine>,
) -> Result<(), BuildError> {
    config_ports.lock().unwrap_or_else(|e| e.into_inner()).set_reset(power_sink(life));
    let control = ControlPort::new(power_sink(life));
    ports.insert(CONTROL_PORT, CONTROL_PORT_LEN, Arc::new(Mutex::new(control)))?;
    ports.insert(FW_CFG_PORT, FW_CFG_LEN, Arc::new(Mutex::new(items)))?;
    if let Some(words) = words {
        ports.insert(DEBUG_PORT, DEBUG_PORT_LEN, Arc::new(Mutex::new(DebugPort::new(words))))?;
    }
    Ok(())
}
