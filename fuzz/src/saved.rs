//! Modified saved state.

use crate::input::Input;
use koya_devices::virtio::Payload;
use koya_devices::virtio::state::TransportState;
use serde_json::{Value, json};

/// A copy of the state with random changes: in the registers, the queues or the device.
pub(crate) fn changed(state: &Payload, input: &mut Input<'_>) -> Payload {
    let Ok(mut transport) = TransportState::SCHEMA.decode::<TransportState>(state) else {
        return state.clone();
    };
    for _ in 0..=input.byte() % 3 {
        change(&mut transport, input);
    }
    let encoded = TransportState::SCHEMA.encode(&transport);
    encoded.unwrap_or_else(|_| state.clone())
}

fn change(state: &mut TransportState, input: &mut Input<'_>) {
    let (field, number) = (input.byte(), input.number());
    let queues = state.queues.len().max(1);
    if let Some(queue) = state.queues.get_mut(usize::from(field / 16) % queues) {
        match field % 16 {
            0 => queue.size = number as u16,
            1 => queue.ready = !queue.ready,
            2 => queue.descriptors = number,
            3 => queue.available = number,
            4 => queue.used = number,
            5 => queue.next_available = number as u16,
            6 => queue.next_used = number as u16,
            _ => {}
        }
    }
    match field % 16 {
        7 => state.status = number as u32,
        8 => state.driver_features = number,
        9 => state.queue_select = number as u32,
        10 => state.interrupt_status = number as u32,
        11 => drop(state.queues.pop()),
        12 => state.device.version = number as u16,
        13.. => {
            if let Ok(mut value) = serde_json::from_slice(&state.device.bytes) {
                let mut leaves = 0;
                count(&value, &mut leaves);
                let mut at = usize::from(input.byte()) % leaves.max(1);
                let new = match input.byte() % 6 {
                    0 => json!(null),
                    1 => json!([[number, 1], [0, number]]),
                    2 => json!([]),
                    _ => json!(number),
                };
                put(&mut value, &mut at, &new);
                state.device.bytes = value.to_string().into_bytes();
            }
        }
        _ => {}
    }
}

fn count(value: &Value, leaves: &mut usize) {
    *leaves += 1;
    match value {
        Value::Array(items) => items.iter().for_each(|item| count(item, leaves)),
        Value::Object(fields) => fields.values().for_each(|field| count(field, leaves)),
        _ => {}
    }
}

/// Replaces the value at this position in pre-order.
fn put(value: &mut Value, at: &mut usize, new: &Value) -> bool {
    if *at == 0 {
        *value = new.clone();
        return true;
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| put(item, at, new)),
        Value::Object(fields) => fields.values_mut().any(|field| put(field, at, new)),
        _ => false,
    }
}
