//! Saving, restoring and resuming a transport.

use super::{ACK, DRIVER, FEATURES, MmioTransport, RUNNING};
use crate::virtio::state::{Payload, QueueState, TransportState};
use crate::virtio::{Interrupt, StateError};
use koya_host::sync::lock;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::QueueT;

impl MmioTransport {
    /// Stops serving the queues and returns the state. The device stays stopped until
    /// [`resume`](Self::resume) or a reset by its driver.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] for devices whose state cannot be saved; they continue.
    pub fn save(&mut self) -> Result<Payload, StateError> {
        // Tried first: a device that can't be saved must not be stopped.
        lock(&self.device).save()?;
        self.stop_queues();
        let queues = self.queues.iter().map(|queue| QueueState {
            size: queue.size(),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        });
        let registers = &self.line.registers;
        TransportState::SCHEMA.encode(&TransportState {
            status: self.status(),
            driver_features: self.driver_features,
            interrupt_status: registers.load(VIRTIO_MMIO_INTERRUPT_STATUS),
            config_generation: registers.load(VIRTIO_MMIO_CONFIG_GENERATION),
            queue_select: self.queue_select,
            features_select: self.features_select,
            driver_features_select: self.driver_features_select,
            queues: queues.collect(),
            device: lock(&self.device).save()?,
        })
    }

    /// Restores saved state. The device stays stopped until [`resume`](Self::resume).
    ///
    /// # Errors
    /// If the state does not fit the device, which is then reset.
    pub fn restore(&mut self, state: &Payload) -> Result<(), StateError> {
        self.reset();
        let state = TransportState::SCHEMA.decode(state);
        let restored = state.and_then(|state| self.try_restore(&state));
        if restored.is_err() {
            self.reset();
        }
        restored
    }

    fn try_restore(&mut self, state: &TransportState) -> Result<(), StateError> {
        // Any other status might activate features that were never checked.
        let reached = state.status & !(VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED);
        if ![0, ACK, DRIVER, FEATURES, RUNNING].contains(&reached) {
            return Err(StateError::Mismatch("no driver reaches its device status"));
        }
        if state.queues.len() != self.queues.len() {
            return Err(StateError::Mismatch("it has another number of queues"));
        }
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            let size = saved.size;
            if !size.is_power_of_two() || size > queue.max_size() {
                return Err(StateError::Mismatch("a queue has another size"));
            }
            let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
            queue.set_size(size);
            let (low, high) = halves(saved.descriptors);
            queue.set_desc_table_address(low, high);
            let (low, high) = halves(saved.available);
            queue.set_avail_ring_address(low, high);
            let (low, high) = halves(saved.used);
            queue.set_used_ring_address(low, high);
            queue.set_next_avail(saved.next_available);
            queue.set_next_used(saved.next_used);
            queue.set_ready(saved.ready);
            // Addresses that are not aligned were ignored.
            let taken = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
            if taken != (saved.descriptors, saved.available, saved.used) {
                return Err(StateError::Mismatch("a queue's address is not aligned"));
            }
        }
        lock(&self.device).restore(&state.device)?;
        self.driver_features = state.driver_features;
        if state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.are_features_valid() {
            return Err(StateError::Mismatch(
                "the driver accepted what is not offered here",
            ));
        }
        self.queue_select = state.queue_select;
        self.features_select = state.features_select;
        self.driver_features_select = state.driver_features_select;
        let registers = &self.line.registers;
        registers.store(VIRTIO_MMIO_STATUS, state.status);
        registers.store(VIRTIO_MMIO_CONFIG_GENERATION, state.config_generation);
        registers.store(VIRTIO_MMIO_INTERRUPT_STATUS, state.interrupt_status);
        self.write_selected_registers();
        Ok(())
    }

    /// Continues after [`save`](Self::save) or [`restore`](Self::restore): the queues are served again if the
    /// driver had activated the device.
    ///
    /// # Errors
    /// If the queues are not in guest memory, or the host refuses a resource.
    pub fn resume(&mut self) -> Result<(), StateError> {
        let broken = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        let status = self.status();
        let runs = status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && status & broken == 0;
        if runs && !self.active {
            let activated = self.try_activate();
            activated.map_err(StateError::resume)?;
            // The configuration may have changed without a notification, and an interrupt may have been
            // pending. A spurious interrupt does no harm.
            self.line.config();
        }
        Ok(())
    }

    fn stop_queues(&mut self) {
        let worker = self.worker.take().and_then(|id| self.event_loop.remove(id));
        if !std::mem::take(&mut self.active) {
            return;
        }
        lock(&self.device).stop(worker);
        for (queue, position) in self.queues.iter_mut().zip(self.positions.drain(..)) {
            if let Some(position) = position {
                let (available, used) = position.get();
                queue.set_next_avail(available);
                queue.set_next_used(used);
            }
        }
    }
}
