"""The privacy policy and the audit log of the device."""
