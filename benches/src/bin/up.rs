//! Init of a guest whose start is measured: reports that it runs, and waits for the end.

use std::time::Duration;

fn main() {
    println!("GUEST-UP");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
