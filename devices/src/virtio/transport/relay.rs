//! Signals of somebody else, for a driver that has INTA#: nothing but us sets the ISR, which a level follows.

use std::io;
use std::sync::Arc;

use event_manager::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::host::Pin;
use crate::metrics::DeviceMetrics;
use crate::virtio::{Active, Handler, Interrupt, Session, Worker};

const SIGNAL: u32 = 0;

/// A way to a driver's INTA# for all queues of a device, on a thread of its own until it is dropped.
pub(super) struct Relay {
    signal: EventFd,
    _worker: Worker<Signal>,
}

impl Relay {
    /// To `interrupt`.
    ///
    /// # Errors
    /// The host has no thread or descriptors left.
    pub(super) fn start(interrupt: Arc<dyn Interrupt>, metrics: &Arc<DeviceMetrics>) -> io::Result<Self> {
        let signal = EventFd::new(EFD_NONBLOCK)?;
        let mut worker = Worker::new("intx", Signal(signal.try_clone()?), Arc::clone(metrics));
        worker.start(Active { queues: Vec::new(), features: 0, interrupt })?;
        Ok(Self { signal, _worker: worker })
    }
}

impl Pin for Relay {
    fn trigger(&self) -> &EventFd {
        &self.signal
    }
}

/// The signal. Never read, so that nobody who has it can make that wait: each signal is an edge.
struct Signal(EventFd);

impl Handler for Signal {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        if let Err(error) = session.watch(&self.0, SIGNAL, EventSet::IN | EventSet::EDGE_TRIGGERED) {
            session.metrics.host_fault(|| format!("cannot watch another's interrupts: {error}"));
        }
    }

    fn notified(&mut self, _queue: usize, _session: &mut Session<'_, '_>) {}

    fn ready(&mut self, _token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        // INTA# does not tell of which queue.
        session.interrupt.used(0);
    }
}
