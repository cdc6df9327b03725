"""logitless under the trainers of TRL: any loss of the registry in them (`losses`)."""
