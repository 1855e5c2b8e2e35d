//! The README example: a container in a virtual machine, in this process.

fn main() -> Result<(), koya::Error> {
    let sandbox = koya::Sandbox::start(&koya::SandboxConfig::default())?;
    let config = koya::ContainerConfig::new("rootfs", ["uname", "-a"]);
    let container = sandbox.run("hello", &config)?;
    let output = container.output()?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}
