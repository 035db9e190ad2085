//! The few devices of a PC that Linux expects at fixed ports: serial port, clock, interval timer, reset line, ACPI power registers; one
//! that the ACPI tables speak of, for devices that come and go; and those that only firmware and boot loaders need: its
//! configuration, control port A, a port for what it says.
//!
//! All are called on vCPU threads through [`crate::bus::Bus`]. None of them owns a thread or a descriptor that blocks,
//! but the interval timer, once it is asked for interrupts.

mod acpi_pm;
mod boot_timer;
pub mod calendar;
mod control_port;
mod debug_port;
mod fw_cfg;
mod hotplug;
mod i8042;
mod pit;
mod rtc;
mod serial;

pub use acpi_pm::{
    AcpiPm, GPE_HOTPLUG, GPE_OFFSET, PM_BLOCK_LEN, PM_TIMER_OFFSET, PM1_CONTROL_OFFSET, PM1_EVENT_OFFSET, RESET_OFFSET,
    SLEEP_TYPE_S5,
};
pub use boot_timer::{BOOT_TIMER_LEN, BootTimer, Booted};
pub use control_port::{CONTROL_PORT, CONTROL_PORT_LEN, ControlPort};
pub use debug_port::{DEBUG_PORT, DEBUG_PORT_LEN, DebugLine, DebugPort};
pub use fw_cfg::{FW_CFG_LEN, FW_CFG_PORT, FwCfg, FwCfgError, FwCfgItems, FwCfgKey};
pub use hotplug::{
    CAME_OFFSET, EJECT_OFFSET, EjectSink, HOTPLUG_LEN, HotplugPort, HotplugSignals, MAX_VCPUS, VCPUS_CAME_OFFSET,
    VCPUS_OFFSET, WANTED_OFFSET,
};
pub use i8042::{COMMAND_LEN, COMMAND_PORT, I8042};
pub use pit::{PIT_LEN, PIT_PORT, Pit, SPEAKER_LEN, SPEAKER_PORT, Speaker};
pub use rtc::{RTC_LEN, Rtc};
pub use serial::{SERIAL_LEN, SerialPort};

/// What the guest asks of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off (ACPI S5).
    Off,
    /// A reset of all processors.
    Reset,
}

/// Told of a [`PowerRequest`], on the vCPU thread that made it and with the device locked: must not call the device.
pub type PowerSink = Box<dyn Fn(PowerRequest) + Send>;

/// An interrupt line whose level stays as it was set last.
pub trait IrqLine: Send + Sync {
    /// Raises or lowers the line. Idempotent.
    fn set(&self, asserted: bool);
}
