//! Waits for a backend's end, while its device works: the only thread of ours that a vhost-user device has, unless its driver
//! has INTA#.

use std::sync::Arc;

use event_manager::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::frontend::Frontend;
use crate::virtio::{Handler, Session};

const BACKEND: u32 = 0;
const RING: u32 = 1;

/// Tells driver and status when the backend has gone, or has given a ring up.
pub(super) struct Watch {
    frontend: Arc<Frontend>,
    /// Signalled by the backend when it gives a ring up. Never read: whoever else has it can make a read wait.
    error: Option<EventFd>,
}

impl Watch {
    pub(super) const fn new(frontend: Arc<Frontend>) -> Self {
        Self { frontend, error: None }
    }

    /// To be called before each start, with an event that no earlier backend's signal is in.
    pub(super) fn prepare(&mut self, error: EventFd) {
        self.error = Some(error);
    }

    fn unwatch(&self, session: &mut Session<'_, '_>) {
        session.unwatch(self.frontend.socket());
        if let Some(error) = &self.error {
            session.unwatch(error);
        }
    }
}

impl Handler for Watch {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        let watched = session.watch(self.frontend.socket(), BACKEND, EventSet::READ_HANG_UP);
        let error = self.error.as_ref().map_or(Ok(()), |error| session.watch(error, RING, EventSet::IN));
        if let Err(error) = watched.and(error) {
            session.metrics.host_fault(|| format!("cannot watch a vhost-user backend: {error}"));
        }
    }

    fn notified(&mut self, _queue: usize, _session: &mut Session<'_, '_>) {}

    fn ready(&mut self, token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        if token == BACKEND {
            let what = self.frontend.give_up("has closed the connection");
            let path = self.frontend.path();
            session.metrics.host_fault(|| format!("the vhost-user backend at {path} {what}; start it and the VM anew"));
        } else {
            // As with rings that we work on ourselves: they are the driver's.
            session.metrics.guest_faults.increment();
        }
        // One is enough until a reset, and what is level-triggered would go on.
        self.unwatch(session);
        session.interrupt.needs_reset();
    }
}
