"""The four benchmarks as their authors publish them: which member is which image, of which class, on which side.

Each function yields the items of one set from its original files; what it passes over on purpose it notes in `ignored`.
Paths are those that CoOp's split files use. Anything unexpected is an error: nothing is skipped silently.

TODO What the classes of the benchmarks are called, where that can be said without their files. Names, nothing else.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

from data.benchmarks.archives import Files, is_of_the_system
from data.dataset import Item, content_key
from kshot.errors import DatasetError

# ---- What the classes of the benchmarks are called, where that can be said without their files. Names, nothing else.

# The folders of the archive.
CALTECH101 = (
    *("BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion", "airplanes", "anchor"),
    *("ant", "barrel", "bass", "beaver", "binocular", "bonsai", "brain", "brontosaurus", "buddha", "butterfly"),
    *("camera", "cannon", "car_side", "ceiling_fan", "cellphone", "chair", "chandelier", "cougar_body"),
    *("cougar_face", "crab", "crayfish", "crocodile", "crocodile_head", "cup", "dalmatian", "dollar_bill"),
    *("dolphin", "dragonfly", "electric_guitar", "elephant", "emu", "euphonium", "ewer", "ferry", "flamingo"),
    *("flamingo_head", "garfield", "gerenuk", "gramophone", "grand_piano", "hawksbill", "headphone"),
    *("hedgehog", "helicopter", "ibis", "inline_skate", "joshua_tree", "kangaroo", "ketch", "lamp", "laptop"),
    *("llama", "lobster", "lotus", "mandolin", "mayfly", "menorah", "metronome", "minaret", "nautilus"),
    *("octopus", "okapi", "pagoda", "panda", "pigeon", "pizza", "platypus", "pyramid", "revolver", "rhino"),
    *("rooster", "saxophone", "schooner", "scissors", "scorpion", "sea_horse", "snoopy", "soccer_ball"),
    *("stapler", "starfish", "stegosaurus", "stop_sign", "strawberry", "sunflower", "tick", "trilobite"),
    *("umbrella", "watch", "water_lilly", "wheelchair", "wild_cat", "windsor_chair", "wrench", "yin_yang"),
)
# By the numbers in imagelabels.mat, from 1 on.
FLOWERS = (
    *("pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold"),
    *("tiger lily", "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon"),
    *("colt's foot", "king protea", "spear thistle", "yellow iris", "globe-flower", "purple coneflower"),
    *("peruvian lily", "balloon flower", "giant white arum lily", "fire lily", "pincushion flower"),
    *("fritillary", "red ginger", "grape hyacinth", "corn poppy", "prince of wales feathers"),
    *("stemless gentian", "artichoke", "sweet william", "carnation", "garden phlox", "love in the mist"),
    *("mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower", "great masterwort"),
    *("siam tulip", "lenten rose", "barberton daisy", "daffodil", "sword lily", "poinsettia"),
    *("bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia"),
    *("wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium"),
    *("orange dahlia", "pink-yellow dahlia", "cautleya spicata", "japanese anemone", "black-eyed susan"),
    *("silverbush", "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower"),
    *("tree poppy", "gazania", "azalea", "water lily", "rose", "thorn apple", "morning glory"),
    *("passion flower", "lotus", "toad lily", "anthurium", "frangipani", "clematis", "hibiscus", "columbine"),
    *("desert-rose", "tree mallow", "magnolia", "cyclamen", "watercress", "canna lily", "hippeastrum"),
    *("bee balm", "ball moss", "foxglove", "bougainvillea", "camellia", "mallow", "mexican petunia"),
    *("bromelia", "blanket flower", "trumpet creeper", "blackberry lily"),
)
# As the authors of the set and some copies of it spell them.
FLOWER_SPELLINGS = {"barbeton daisy": "barberton daisy", "pink-yellow dahlia?": "pink-yellow dahlia"}
# The 37 breeds.
PETS = (
    *("Abyssinian", "American Bulldog", "American Pit Bull Terrier", "Basset Hound", "Beagle", "Bengal"),
    *("Birman", "Bombay", "Boxer", "British Shorthair", "Chihuahua", "Egyptian Mau", "English Cocker Spaniel"),
    *("English Setter", "German Shorthaired", "Great Pyrenees", "Havanese", "Japanese Chin", "Keeshond"),
    *("Leonberger", "Maine Coon", "Miniature Pinscher", "Newfoundland", "Persian", "Pomeranian", "Pug"),
    *("Ragdoll", "Russian Blue", "Saint Bernard", "Samoyed", "Scottish Terrier", "Shiba Inu", "Siamese"),
    *("Sphynx", "Staffordshire Bull Terrier", "Wheaten Terrier", "Yorkshire Terrier"),
)
# The 196 classes in the devkit's order (cars_meta.mat). No row needs them, the devkit says them itself: for measuring.
CARS = (
    *("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012", "Acura TL Type-S 2008"),
    *("Acura TSX Sedan 2012", "Acura Integra Type R 2001", "Acura ZDX Hatchback 2012"),
    *("Aston Martin V8 Vantage Convertible 2012", "Aston Martin V8 Vantage Coupe 2012"),
    *("Aston Martin Virage Convertible 2012", "Aston Martin Virage Coupe 2012", "Audi RS 4 Convertible 2008"),
    *("Audi A5 Coupe 2012", "Audi TTS Coupe 2012", "Audi R8 Coupe 2012", "Audi V8 Sedan 1994", "Audi 100 Sedan 1994"),
    *("Audi 100 Wagon 1994", "Audi TT Hatchback 2011", "Audi S6 Sedan 2011", "Audi S5 Convertible 2012"),
    *("Audi S5 Coupe 2012", "Audi S4 Sedan 2012", "Audi S4 Sedan 2007", "Audi TT RS Coupe 2012"),
    *("BMW ActiveHybrid 5 Sedan 2012", "BMW 1 Series Convertible 2012", "BMW 1 Series Coupe 2012"),
    *("BMW 3 Series Sedan 2012", "BMW 3 Series Wagon 2012", "BMW 6 Series Convertible 2007", "BMW X5 SUV 2007"),
    *("BMW X6 SUV 2012", "BMW M3 Coupe 2012", "BMW M5 Sedan 2010", "BMW M6 Convertible 2010", "BMW X3 SUV 2012"),
    *("BMW Z4 Convertible 2012", "Bentley Continental Supersports Conv. Convertible 2012"),
    *("Bentley Arnage Sedan 2009", "Bentley Mulsanne Sedan 2011", "Bentley Continental GT Coupe 2012"),
    *("Bentley Continental GT Coupe 2007", "Bentley Continental Flying Spur Sedan 2007"),
    *("Bugatti Veyron 16.4 Convertible 2009", "Bugatti Veyron 16.4 Coupe 2009", "Buick Regal GS 2012"),
    *("Buick Rainier SUV 2007", "Buick Verano Sedan 2012", "Buick Enclave SUV 2012", "Cadillac CTS-V Sedan 2012"),
    *("Cadillac SRX SUV 2012", "Cadillac Escalade EXT Crew Cab 2007", "Chevrolet Silverado 1500 Hybrid Crew Cab 2012"),
    *("Chevrolet Corvette Convertible 2012", "Chevrolet Corvette ZR1 2012"),
    *("Chevrolet Corvette Ron Fellows Edition Z06 2007", "Chevrolet Traverse SUV 2012"),
    *("Chevrolet Camaro Convertible 2012", "Chevrolet HHR SS 2010", "Chevrolet Impala Sedan 2007"),
    *("Chevrolet Tahoe Hybrid SUV 2012", "Chevrolet Sonic Sedan 2012", "Chevrolet Express Cargo Van 2007"),
    *("Chevrolet Avalanche Crew Cab 2012", "Chevrolet Cobalt SS 2010", "Chevrolet Malibu Hybrid Sedan 2010"),
    *("Chevrolet TrailBlazer SS 2009", "Chevrolet Silverado 2500HD Regular Cab 2012"),
    *("Chevrolet Silverado 1500 Classic Extended Cab 2007", "Chevrolet Express Van 2007"),
    *("Chevrolet Monte Carlo Coupe 2007", "Chevrolet Malibu Sedan 2007", "Chevrolet Silverado 1500 Extended Cab 2012"),
    *("Chevrolet Silverado 1500 Regular Cab 2012", "Chrysler Aspen SUV 2009", "Chrysler Sebring Convertible 2010"),
    *("Chrysler Town and Country Minivan 2012", "Chrysler 300 SRT-8 2010", "Chrysler Crossfire Convertible 2008"),
    *("Chrysler PT Cruiser Convertible 2008", "Daewoo Nubira Wagon 2002", "Dodge Caliber Wagon 2012"),
    *("Dodge Caliber Wagon 2007", "Dodge Caravan Minivan 1997", "Dodge Ram Pickup 3500 Crew Cab 2010"),
    *("Dodge Ram Pickup 3500 Quad Cab 2009", "Dodge Sprinter Cargo Van 2009", "Dodge Journey SUV 2012"),
    *("Dodge Dakota Crew Cab 2010", "Dodge Dakota Club Cab 2007", "Dodge Magnum Wagon 2008"),
    *("Dodge Challenger SRT8 2011", "Dodge Durango SUV 2012", "Dodge Durango SUV 2007", "Dodge Charger Sedan 2012"),
    *("Dodge Charger SRT-8 2009", "Eagle Talon Hatchback 1998", "FIAT 500 Abarth 2012", "FIAT 500 Convertible 2012"),
    *("Ferrari FF Coupe 2012", "Ferrari California Convertible 2012", "Ferrari 458 Italia Convertible 2012"),
    *("Ferrari 458 Italia Coupe 2012", "Fisker Karma Sedan 2012", "Ford F-450 Super Duty Crew Cab 2012"),
    *("Ford Mustang Convertible 2007", "Ford Freestar Minivan 2007", "Ford Expedition EL SUV 2009"),
    *("Ford Edge SUV 2012", "Ford Ranger SuperCab 2011", "Ford GT Coupe 2006", "Ford F-150 Regular Cab 2012"),
    *("Ford F-150 Regular Cab 2007", "Ford Focus Sedan 2007", "Ford E-Series Wagon Van 2012", "Ford Fiesta Sedan 2012"),
    *("GMC Terrain SUV 2012", "GMC Savana Van 2012", "GMC Yukon Hybrid SUV 2012", "GMC Acadia SUV 2012"),
    *("GMC Canyon Extended Cab 2012", "Geo Metro Convertible 1993", "HUMMER H3T Crew Cab 2010"),
    *("HUMMER H2 SUT Crew Cab 2009", "Honda Odyssey Minivan 2012", "Honda Odyssey Minivan 2007"),
    *("Honda Accord Coupe 2012", "Honda Accord Sedan 2012", "Hyundai Veloster Hatchback 2012"),
    *("Hyundai Santa Fe SUV 2012", "Hyundai Tucson SUV 2012", "Hyundai Veracruz SUV 2012"),
    *("Hyundai Sonata Hybrid Sedan 2012", "Hyundai Elantra Sedan 2007", "Hyundai Accent Sedan 2012"),
    *("Hyundai Genesis Sedan 2012", "Hyundai Sonata Sedan 2012", "Hyundai Elantra Touring Hatchback 2012"),
    *("Hyundai Azera Sedan 2012", "Infiniti G Coupe IPL 2012", "Infiniti QX56 SUV 2011", "Isuzu Ascender SUV 2008"),
    *("Jaguar XK XKR 2012", "Jeep Patriot SUV 2012", "Jeep Wrangler SUV 2012", "Jeep Liberty SUV 2012"),
    *("Jeep Grand Cherokee SUV 2012", "Jeep Compass SUV 2012", "Lamborghini Reventon Coupe 2008"),
    *("Lamborghini Aventador Coupe 2012", "Lamborghini Gallardo LP 570-4 Superleggera 2012"),
    *("Lamborghini Diablo Coupe 2001", "Land Rover Range Rover SUV 2012", "Land Rover LR2 SUV 2012"),
    *("Lincoln Town Car Sedan 2011", "MINI Cooper Roadster Convertible 2012", "Maybach Landaulet Convertible 2012"),
    *("Mazda Tribute SUV 2011", "McLaren MP4-12C Coupe 2012", "Mercedes-Benz 300-Class Convertible 1993"),
    *("Mercedes-Benz C-Class Sedan 2012", "Mercedes-Benz SL-Class Coupe 2009", "Mercedes-Benz E-Class Sedan 2012"),
    *("Mercedes-Benz S-Class Sedan 2012", "Mercedes-Benz Sprinter Van 2012", "Mitsubishi Lancer Sedan 2012"),
    *("Nissan Leaf Hatchback 2012", "Nissan NV Passenger Van 2012", "Nissan Juke Hatchback 2012"),
    *("Nissan 240SX Coupe 1998", "Plymouth Neon Coupe 1999", "Porsche Panamera Sedan 2012"),
    *("Ram C/V Cargo Van Minivan 2012", "Rolls-Royce Phantom Drophead Coupe Convertible 2012"),
    *("Rolls-Royce Ghost Sedan 2012", "Rolls-Royce Phantom Sedan 2012", "Scion xD Hatchback 2012"),
    *("Spyker C8 Convertible 2009", "Spyker C8 Coupe 2009", "Suzuki Aerio Sedan 2007", "Suzuki Kizashi Sedan 2012"),
    *("Suzuki SX4 Hatchback 2012", "Suzuki SX4 Sedan 2012", "Tesla Model S Sedan 2012", "Toyota Sequoia SUV 2012"),
    *("Toyota Camry Sedan 2012", "Toyota Corolla Sedan 2012", "Toyota 4Runner SUV 2012"),
    *("Volkswagen Golf Hatchback 2012", "Volkswagen Golf Hatchback 1991", "Volkswagen Beetle Hatchback 2012"),
    *("Volvo C30 Hatchback 2012", "Volvo 240 Sedan 1993", "Volvo XC90 SUV 2007", "smart fortwo Convertible 2012"),
)


# ---- The four benchmarks as their authors publish them: which member is which image, of which class, on which side.

NO_IMAGES = {"BACKGROUND_Google/tmp"}  # Caltech-101's archive holds this one


def caltech101(files: Files, ignored: list[str]) -> Iterator[Item]:
    """101_ObjectCategories/<class>/image_NNNN.jpg; no split."""
    for name, image in files.members("images"):
        path = name.partition("101_ObjectCategories/")[2]
        if is_of_the_system(name) or path in NO_IMAGES:
            ignored.append(path or name)
        elif path.count("/") == 1 and path.endswith(".jpg"):
            yield Item(path, "", path.partition("/")[0], image, content_key(image))
        elif path:  # the archive around this one holds annotations as well
            raise DatasetError(f"{files.path('images')}: {name} is neither an image nor known; remove it")


def flowers(files: Files, ignored: list[str]) -> Iterator[Item]:
    """jpg/image_NNNNN.jpg; imagelabels.mat holds the class of image N, setid.mat which numbers are in which split."""

    labels = _mat(files.read("labels", "imagelabels.mat"), "labels")
    ids = files.read("split", "setid.mat")
    split = {int(n): name for key, name in FLOWER_SPLITS.items() for n in _mat(ids, key)}
    numbers = {f"image_{n:05d}.jpg": n for n in range(1, len(labels) + 1)}
    for path, image in _images(files, numbers, ignored):
        n = numbers[path]
        if n not in split:
            raise DatasetError(f"setid.mat has image {n} in no split; download it again")
        yield Item(path, split[n], _class(FLOWERS, labels[n - 1], "imagelabels.mat"), image, content_key(image))


def pets(files: Files, ignored: list[str]) -> Iterator[Item]:
    """images/<id>.jpg; annotations/{trainval,test}.txt list the ids, which are <Class_name>_<number>."""
    lists = {"trainval.txt": "train", "test.txt": "test"}
    listed: dict[str, tuple[str, str]] = {}
    for name, split in lists.items():
        for line in files.read("annotations", name).decode(errors="replace").splitlines():
            if line.strip() and not line.startswith("#"):
                identity = line.split()[0]
                listed[f"{identity}.jpg"] = (split, identity.rpartition("_")[0])
    for path, image in _images(files, listed, ignored):
        yield Item(path, *listed[path], image, content_key(image))


def cars(files: Files, ignored: list[str]) -> Iterator[Item]:
    """cars_{train,test}/NNNNN.jpg; the devkit's .mat files hold the class names and the class of each image."""
    names = [str(name) for name in _mat(files.read("devkit", "cars_meta.mat"), "class_names")]
    sides = {
        "train": files.read("devkit", "cars_train_annos.mat"),
        "test": files.read("test labels", "cars_test_annos_withlabels.mat"),
    }
    for split, annotations in sides.items():
        rows = _mat(annotations, "annotations")
        label = {str(row["fname"]): _class(names, row["class"], "the devkit") for row in rows}
        for path, image in _images(files, label, ignored, split):
            yield Item(f"cars_{split}/{path}", split, label[path], image, content_key(image))


FLOWER_SPLITS = {"trnid": "train", "valid": "validation", "tstid": "test"}
LAYOUTS = {"caltech101": caltech101, "flowers": flowers, "pets": pets, "cars": cars}


def _images(
    files: Files, listed: dict[str, Any], ignored: list[str], part: str = "images"
) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of the listed images. Images that no list names are ignored; a listed one must be there."""
    missing = dict.fromkeys(listed)
    for name, image in files.members(part):
        file = name.rpartition("/")[2]
        if file in missing:
            del missing[file]
            yield file, image
        elif file in listed:
            raise DatasetError(f"{files.path(part)} has {file} twice, the second time as {name}; remove one")
        else:
            ignored.append(name)
    if missing:
        raise DatasetError(
            f"{files.path(part)} lacks {next(iter(missing))} and {len(missing) - 1} more that are listed"
        )


def _class(names: Sequence[str], number: Any, where: str) -> str:
    """The class of that number, from 1 on."""
    if not 1 <= int(number) <= len(names):
        raise DatasetError(
            f"{where} has a class {int(number)}, but classes go from 1 to {len(names)}; get the original"
        )
    return names[int(number) - 1]


def _mat(content: bytes, name: str) -> Any:
    """The variable of that name as a one-dimensional array."""
    from numpy import ravel
    from scipy.io import loadmat

    try:
        return ravel(loadmat(io.BytesIO(content), squeeze_me=True)[name])
    except Exception as error:  # its readers raise many unrelated types on bytes that are broken
        raise DatasetError(f"the .mat file with {name} is broken ({error}); download it again") from error
