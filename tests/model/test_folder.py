from pathlib import Path
def test_x(wan_folder: Path) -> None:
    from anyflow_cli.model.folder import load_network, save_pipeline
    from anyflow_cli.model.network import two_time_from
    n = load_network(wan_folder)
    t = wan_folder.parent/"af"
    save_pipeline(t, two_time_from(n), wan_folder, {"a":1})
    from diffusers import AnyFlowPipeline
    p = AnyFlowPipeline.from_pretrained(t)
    print([str(x) for x in t.rglob("*")])
