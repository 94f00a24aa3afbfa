"""The remote runtime: kernels of a gateway, used by applications on another machine as if they were here.

Kernelspecs name :class:`sandbox_gateway.remote.provisioner.RemoteSandboxProvisioner`; programs that only want the
gateway's REST use :class:`sandbox_gateway.remote.client.GatewayClient`. Everything here imports and runs on Linux,
macOS and Windows.
"""
